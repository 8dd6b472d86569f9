"""What surrounds a denoiser in a diffusers pipeline: the pipeline itself, its text encoders, its decoder."""
