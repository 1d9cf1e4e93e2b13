"""Distances between sets of images over pluggable feature extractors, and the quality-against-FLOPs curve."""
