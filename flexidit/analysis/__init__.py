"""The paper's studies of what a flexible model does."""
