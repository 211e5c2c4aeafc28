"""Process groups, SLURM's variables, and what a machine without CUDA needs."""
