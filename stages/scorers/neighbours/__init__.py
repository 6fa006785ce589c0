"""Scores of ID training rows near by."""
