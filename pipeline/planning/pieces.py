"""What is timed apart from pilots, on drawn numbers: searches, intervals, heads of many classes."""

import time
from collections.abc import Mapping

import numpy as np

from pipeline.config import RunConfig
from pipeline.planning.pilot import REPLICATES
from pipeline.sources import GROUP_OF_ROLE
from stages.heads.choose import HeadRows, choose_head
from stages.id_data.lazy import LazyArray
from stages.machine import usable_cores
from stages.results.method import FROZEN_KNN
from stages.results.table import Evaluator, MethodRun
from stages.scorers.neighbours.bank import FeatureBank

_BANK, _QUERIES = 1 << 13, 1 << 10  # rows of a search that is timed
_ROWS_A_CORE, _CLASSES = 1 << 10, 256  # of a head that is timed: a block for each core, and more than it has overhead
_APART = 4.0  # deviations of a class's rows that means of classes lie from one another, about


def seconds_of_search(dim: int) -> float:
    """Of a query times a row of the bank, of `dim` features."""
    rng = np.random.default_rng(0)
    bank, queries = (rng.standard_normal((n, dim), dtype=np.float32) for n in (_BANK, _QUERIES))
    found = FeatureBank(bank)
    found.search(queries[:64], 10)
    began = time.perf_counter()
    found.search(queries, 10)
    return (time.perf_counter() - began) / (_BANK * _QUERIES)


def seconds_of_method(config: RunConfig, rows: Mapping[str, int]) -> float:
    """Of metrics and intervals of one line of the table.

    Args:
        config: the study.
        rows: of each set, by its name.
    """
    rng = np.random.default_rng(0)
    (test,) = config.sets_of("id-test")
    others = [entry for entry in config.sets_of(*GROUP_OF_ROLE) if entry is not test]
    sizes = {"id": rows[test.name]} | {entry.name: rows[entry.name] for entry in others}
    scores = {name: rng.standard_normal(n, dtype=np.float32) for name, n in sizes.items()}
    evaluator = Evaluator([(entry.name, GROUP_OF_ROLE[entry.role]) for entry in others], sizes, REPLICATES)
    run = MethodRun(FROZEN_KNN, None, "{}", config.score.profile)
    _ = evaluator.counts  # drawn once for all methods
    began = time.perf_counter()
    evaluator.rows(run, scores["id"], scores)
    return (time.perf_counter() - began) * config.score.bootstrap / REPLICATES


def seconds_of_heads(n_classes: int, dim: int) -> float:
    """Of a row times a class that the head of a model is chosen and fitted on, of all strengths.

    Args:
        n_classes: that it tells apart.
        dim: features.
    """
    rng = np.random.default_rng(0)
    n, n_classes = _ROWS_A_CORE * usable_cores(), min(n_classes, _CLASSES)
    means = rng.standard_normal((n_classes, dim), dtype=np.float32) * (_APART / np.sqrt(2 * dim))
    labels = np.arange(n, dtype=np.int32) % n_classes
    rows = LazyArray.of(means[labels] + rng.standard_normal((n, dim), dtype=np.float32))
    few = np.arange(0, n, 4)
    began = time.perf_counter()
    choose_head(HeadRows(rows, labels, rows[few], labels[few]), n_classes)
    return (time.perf_counter() - began) / (n * n_classes)
