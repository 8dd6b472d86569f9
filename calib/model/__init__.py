"""The diffusers denoiser: loading it, its layers, its network with other modules at these."""
