"""Digits 0 to 6 as ID, 7 to 9 as OOD, as scores see them."""

import numpy as np
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

from stages.heads.affine import LinearHead
from stages.scorers.inputs import ScoreInputs


def digits_rows():
    """Rows ``train``, ``test`` and ``ood``: 24 principal components of each image, and a softmax head on them."""
    images, labels = load_digits(return_X_y=True)
    known = labels < 7
    features = (PCA(24, svd_solver="full").fit(images[known]).transform(images) / 10 + 0.5).astype(np.float32)
    model = LogisticRegression(max_iter=500, C=0.1).fit(features[known][::2], labels[known][::2])
    head = LinearHead(model.coef_.astype(np.float32), model.intercept_.astype(np.float32))
    rows = {"train": known & (np.cumsum(known) % 2 == 1), "test": known & (np.cumsum(known) % 2 == 0), "ood": ~known}
    return {
        name: ScoreInputs(features[mask], head.logits(features[mask]), labels[mask], head=head)
        for name, mask in rows.items()
    }
