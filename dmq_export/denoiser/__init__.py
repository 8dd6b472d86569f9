"""What a diffusers denoiser takes, as its configuration says, and the conditioning that is given to it."""
