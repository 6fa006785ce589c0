"""Backbones: their weights, their tokens, and the last blocks that become experts."""
