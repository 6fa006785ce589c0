"""One fit of a logistic regression, as tests ask for it."""

from stages.heads.logistic import LogisticFit, logistic_problem
from stages.heads.sums import GivenRows


def minimum(features, labels, n_classes, strength, standardise, **options) -> LogisticFit:
    """The minimum at one strength; options as of `stages.heads.logistic.LogisticProblem.minimum`."""
    with logistic_problem(GivenRows(features, labels, standardise), n_classes) as problem:
        return problem.minimum(strength, **options)
