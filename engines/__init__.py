"""Engines that run an exported network, and the images that come out. The home of runtimes."""
