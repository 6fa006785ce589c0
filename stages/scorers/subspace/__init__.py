"""Scores of the subspace that ID features span."""
