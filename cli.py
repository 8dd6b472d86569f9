"""Runs the command line from a checkout: ``python cli.py -h``. Not part of the wheel."""

from dmq_export.cli import main

if __name__ == "__main__":
    main()
