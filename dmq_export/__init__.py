"""Quantizes diffusers denoisers with DMQ and carries them to integer engines."""

__version__ = "0.1.0"
__all__ = ["__version__"]
