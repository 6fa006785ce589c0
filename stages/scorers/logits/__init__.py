"""Scores of logits."""
