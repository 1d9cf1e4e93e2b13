"""Transformer families, one file each, with the module names of the family's public checkpoints."""
