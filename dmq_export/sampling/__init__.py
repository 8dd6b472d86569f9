"""The denoising loop and what belongs to it: schedulers' names, noise, DDIM in NumPy, pictures, shards of samples."""
