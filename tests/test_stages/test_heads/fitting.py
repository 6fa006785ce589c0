"""One fit of a logistic regression, as tests ask for it."""

from stages.heads.logistic import LogisticFit, logistic_problem


def minimum(features, labels, n_classes, strength, standardise, **options) -> LogisticFit:
    """The minimum at one strength; options as of `stages.heads.logistic.LogisticProblem.minimum`."""
    with logistic_problem(features, labels, n_classes, standardise) as problem:
        return problem.minimum(strength, **options)
