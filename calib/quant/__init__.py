"""Quantization on tensors: codes, the patches that layers see, and second moments of these."""
