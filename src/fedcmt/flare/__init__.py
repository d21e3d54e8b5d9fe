"""The only code that imports NVIDIA FLARE."""
