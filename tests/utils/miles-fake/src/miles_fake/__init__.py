"""A plugin distribution by somebody else."""
