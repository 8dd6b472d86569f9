"""What the float network sees on its way from noise to samples, and what its layers and blocks do."""
