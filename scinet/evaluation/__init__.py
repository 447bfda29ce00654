"""Metrics, the scores of a split, and comparisons of methods."""
