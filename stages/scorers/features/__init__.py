"""Scores of features, and of the linear head's weights."""
