"""All knowledge of model families, and nothing else."""
