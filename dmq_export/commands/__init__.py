"""What the command line does, as functions: the only code that sees calibration, export and engines together."""
