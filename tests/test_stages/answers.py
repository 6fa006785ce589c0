"""What `predict` says of the rows of a cache."""


def answers_of(predictor, cache, rows=slice(None)):
    """A `Prediction` a row, by the arrays that the detector reads."""
    reads = predictor.detector.runtime.reads | ({"logits"} & cache.spec.datasets().keys())
    return predictor.predict(cache.ids[rows].tolist(), {name: cache.read(name, rows) for name in reads})
