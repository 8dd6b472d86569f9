"""Calibration: fits the numbers of every quantized layer. The home of torch."""
