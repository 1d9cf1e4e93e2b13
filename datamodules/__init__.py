"""Data for training: Lightning data modules that name, count and survive broken samples, and resume exactly."""
