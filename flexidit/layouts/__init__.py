"""How public checkpoints name and shape the parameters of each family, and the way from there to ours and back."""
