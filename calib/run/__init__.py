"""A run of the calibration: its plan, its stages, its processes, and what it is worth."""
