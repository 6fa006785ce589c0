"""Listens to progress, and counts what each task said that it would do, and did."""

from stages.progress import NullProgress


class Tallies(NullProgress):
    """Attribute `told`: of each task in turn its description, its total, and what was counted."""

    def __init__(self):
        self.told = []

    def start(self, total, unit, description, after_s=0.0):
        self.told.append([description, total, 0])

    def advance(self, n=1, **fields):
        self.told[-1][2] += n
