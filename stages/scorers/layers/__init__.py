"""Scores of the tokens after several blocks or stages."""
