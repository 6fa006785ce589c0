"""Weights as people have them: names as they are pasted, files as they are downloaded, and what is left of a file."""
