"""``python -m dmq_export``, as ``torchrun -m dmq_export`` needs it."""

from dmq_export.cli import main

if __name__ == "__main__":
    main()
