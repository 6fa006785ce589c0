"""Metrics of scores, and their intervals."""
