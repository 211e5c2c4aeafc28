"""The parts of gpu_check.py: each says one thing about a GPU, and none stops the next."""
