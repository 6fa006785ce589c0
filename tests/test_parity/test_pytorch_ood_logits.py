"""Scores of logits, and of the last layer's input and weights, against pytorch-ood on real cached features.

EfficientNet's pooled features are not negative, as the family of ReAct wants them; "signed" are the same less their
medians, as a ViT's would be. Where the libraries differ by a bug or by rounding, a test has a minimal example.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pytorch_ood.detector import ASH, DICE, GEN, LTS, SCALE, VRA, Entropy, GradNorm, KLMatching, MaxLogit, ReAct
from pytorch_ood.detector import TemperatureScaling as PytorchOODTemperature
from pytorch_ood.metrics import functional as reference
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score, roc_curve

from stages.heads.affine import LinearHead
from stages.metrics.ranking import ood_metrics
from stages.scorers import get_scorer
from stages.scorers.features.lts import lts_score
from stages.scorers.inputs import ScoreInputs
from stages.scorers.logits.entropy import entropy_score
from stages.scorers.scorer import Scorer

PYTORCH_OOD = "pytorch-ood"


@pytest.fixture(scope="module", params=["real", "signed"])
def parts(request, caches, data, probe):
    """Training, held-out, ID and OOD rows, with the linear probe."""
    head = probe.final.on_raw_features()
    train = np.float32(data.train.read("cls"))
    fold = data.split.folds[0]
    features = {
        "train": train[fold.train],
        "select": train[fold.select],
        "id": np.float32(caches["test"].read("cls")),
        "ood": np.float32(np.concatenate([caches["near"].read("cls"), caches["far"].read("cls")])),
    }
    if request.param == "signed":
        middle = np.median(features["train"], axis=0)
        head = LinearHead(head.weight, head.bias + head.weight @ middle)
        features = {name: rows - middle for name, rows in features.items()}
    labels = {"train": data.train_labels[fold.train], "select": data.train_labels[fold.select]}
    return {name: ScoreInputs(rows, labels=labels.get(name), head=head) for name, rows in features.items()}


@pytest.fixture(scope="module")
def apply_head(parts):
    """The head as pytorch-ood calls it, on features of any number of axes."""
    weight, bias = (
        torch.from_numpy(np.float32(each)) for each in (parts["train"].head.weight, parts["train"].head.bias)
    )
    return lambda z: z.flatten(1) @ weight.T + bias


def ours(name: str, parts, **settings) -> np.ndarray:
    scorer = get_scorer(name, PYTORCH_OOD, **settings).fit(parts["train"], parts["select"])
    return np.concatenate([scorer.score(parts[part]) for part in ("id", "ood")])


def theirs(predict, parts, what: str = "features", axes: int = 2, dtype: type = np.float32) -> np.ndarray:
    arrays = [dtype(parts[part].need(what, "a test")) for part in ("id", "ood")]
    rows = torch.from_numpy(np.concatenate(arrays))
    with torch.no_grad():
        return predict(rows.reshape(*rows.shape, *(1,) * (axes - 2))).numpy()


def same(scores: np.ndarray, expected: np.ndarray, rtol: float = 1e-5, atol: float = 0.0) -> None:
    """Equal, and of equal ranks wherever the other library's float32 can tell two rows apart."""
    np.testing.assert_allclose(scores, expected, rtol=rtol, atol=atol)
    order = np.argsort(expected, kind="stable")
    apart = np.diff(expected[order]) > 2 * (rtol * np.abs(expected[order][1:]) + atol)
    assert (np.diff(scores[order])[apart] > 0).all()
    assert apart.sum() > len(scores) // 4  # the comparison of ranks is about something
    assert np.corrcoef(rankdata(scores), rankdata(expected))[0, 1] > 0.999


def test_max_logit(parts):
    same(ours("max-logit", parts), theirs(MaxLogit.score, parts, "logits"))


def test_gen(parts):
    """The mean over all classes there, the sum here; both clip p at 1e-7. In float32 there, 1 − p loses its digits."""
    n_classes = len(parts["train"].head.bias)
    sums = np.exp(ours("gen", parts))  # ours is their logarithm
    same(sums, n_classes * theirs(GEN.score, parts, "logits", dtype=np.float64), rtol=1e-4)
    top = np.exp(ours("gen", parts, top=2, gamma=0.5))
    two = theirs(lambda logits: GEN.score(logits, gamma=0.5, M=2), parts, "logits", dtype=np.float64)
    same(top, 2 * two, rtol=1e-4, atol=1e-6)


def test_entropy(parts):
    """p is clipped at 1e-7 there: up to 1.6e-6 a class is added. Ours is the logarithm."""
    same(np.exp(ours("entropy", parts)), theirs(Entropy.score, parts, "logits"), atol=1e-5)


def test_an_entropy_of_saturated_rows_keeps_their_order():
    logits = np.array([[25.0, 0, 0], [30.0, 0, 0], [35.0, 0, 0]])
    assert (np.diff(entropy_score(logits)) < 0).all()
    clipped = Entropy.score(torch.from_numpy(logits)).numpy()
    assert clipped[1] == pytest.approx(clipped[2], rel=1e-5)  # what is left there is the clipping
    assert clipped[2] > 1e6 * np.exp(entropy_score(logits)[2])


def test_kl_matching(parts):
    train = torch.from_numpy(parts["train"].need("logits", "a test"))
    detector = KLMatching(None).fit_logits(train, torch.from_numpy(np.int64(parts["train"].labels)))
    same(ours("kl-matching", parts), theirs(detector.predict_logits, parts, "logits"), rtol=1e-4, atol=1e-5)


def test_temperature_scaling(parts):
    detector = PytorchOODTemperature(None)
    select = parts["select"]
    logits = torch.from_numpy(np.float64(select.need("logits", "a test")))
    detector.fit_logits(logits, torch.from_numpy(np.int64(select.labels)))
    scorer = get_scorer("temperature-scaling", PYTORCH_OOD).fit(parts["train"], select)
    assert scorer.params()["temperature"] == pytest.approx(detector.t.item(), rel=1e-6)
    same(np.expm1(ours("temperature-scaling", parts)), theirs(detector.predict_logits, parts, "logits"))


@pytest.mark.parametrize("percentile", [80.0, 90.0, 99.5])
def test_react(parts, apply_head, percentile):
    detector = ReAct(None, apply_head, percentile=percentile / 100)
    train = torch.from_numpy(parts["train"].features)
    detector.fit_feature_maps(train, torch.from_numpy(np.int64(parts["train"].labels)))
    scorer = get_scorer("react", PYTORCH_OOD, percentile=percentile).fit(parts["train"])
    assert scorer.params()["threshold"] == pytest.approx(detector.threshold, rel=1e-6)
    same(ours("react", parts, percentile=percentile), theirs(detector.predict_feature_maps, parts))


def well_defined(parts, share: float) -> np.ndarray:
    """Rows whose largest activations are tied with no other, any of which may be kept, and whose sums do not cancel."""
    z = np.sort(np.concatenate([parts["id"].features, parts["ood"].features]), axis=1)
    k = z.shape[1] - round(z.shape[1] * share)
    total, largest, size = z.sum(axis=1), z[:, -k:].sum(axis=1), np.abs(z).sum(axis=1)
    return (z[:, -k] > z[:, -k - 1]) & (np.abs(total) > 1e-2 * size) & (np.abs(largest) > 1e-2 * size)


@pytest.mark.parametrize("percentile", [65.0, 90.0])
@pytest.mark.parametrize("variant", ["p", "s", "b"])
def test_ash(parts, apply_head, variant, percentile):
    detector = ASH(None, apply_head, variant=f"ash-{variant}", percentile=percentile / 100)
    expected = theirs(detector.predict_feature_maps, parts, axes=4)
    fair = well_defined(parts, percentile / 100)
    same(ours(f"ash-{variant}", parts, percentile=percentile)[fair], expected[fair], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("percentile", [65.0, 85.0])
def test_scale(parts, apply_head, percentile):
    detector = SCALE(None, apply_head, percentile=percentile / 100)
    expected = theirs(detector.predict_feature_maps, parts, axes=4)
    fair = well_defined(parts, percentile / 100)
    same(ours("scale", parts, percentile=percentile)[fair], expected[fair], rtol=1e-4, atol=1e-4)


def test_lts(parts, apply_head):
    expected = theirs(LTS(None, apply_head).predict_features, parts)
    same(ours("lts", parts), expected, rtol=1e-4)


def test_lts_of_a_row_without_a_positive_activation():
    """0 / 0 there: its score is NaN, and with it every metric of the set. Here the logits stay what they are."""
    z, logits = np.float32([[-1.0, -2.0]]), np.float32([[1.0, 0.0]])
    detector = LTS(None, lambda rows: torch.from_numpy(logits))
    assert torch.isnan(detector.predict_features(torch.from_numpy(z))).all()
    assert lts_score(z, logits) == pytest.approx(-np.log(np.exp(logits).sum()))


def test_vra(parts, apply_head):
    train = parts["train"]
    detector = VRA(None, apply_head).fit_feature_maps(
        torch.from_numpy(train.features), torch.from_numpy(np.int64(train.labels))
    )
    same(ours("vra", parts), theirs(detector.predict_feature_maps, parts))


@pytest.mark.parametrize("percentile", [70.0, 90.0])
def test_dice(parts, percentile):
    """The same by a masked product: there are rows x classes x features of memory there."""
    train = parts["train"]
    weight, bias = (torch.from_numpy(np.float32(each)) for each in (train.head.weight, train.head.bias))
    detector = DICE(None, weight, bias, p=percentile / 100)
    detector.fit_features(torch.from_numpy(train.features), torch.from_numpy(np.int64(train.labels)))
    same(ours("dice", parts, percentile=percentile), theirs(detector.predict_features, parts), rtol=1e-4, atol=1e-5)


def test_gradnorm(parts):
    """Autograd of the mean over classes there, the closed form of the sum here: C times as much."""
    head = parts["train"].head
    few = {name: parts[name].take(slice(0, 40)) for name in ("id", "ood")} | {"train": parts["train"]}
    layer = torch.nn.Linear(head.weight.shape[1], len(head.bias))
    layer.weight.data, layer.bias.data = (torch.from_numpy(np.float32(each)) for each in (head.weight, head.bias))
    detector = GradNorm(layer, param_filter=lambda name: name == "weight")
    rows = torch.from_numpy(np.concatenate([few[name].features for name in ("id", "ood")]))
    expected = len(head.bias) * detector.predict(rows).numpy()
    scorer: Scorer = get_scorer("gradnorm")
    scores = np.concatenate([scorer.score(few[name]) for name in ("id", "ood")])
    same(scores, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["energy", "react", "gen", "gradnorm"])
def test_metrics(parts, name):
    """Of scores of real features, some saturated, against pytorch-ood (OOD positive) and scikit-learn."""
    scorer = get_scorer(name).fit(parts["train"], parts["select"])
    ids, oods = (np.float64(scorer.score(parts[part])) for part in ("id", "ood"))
    found = ood_metrics(ids, oods)
    scores, is_ood = np.concatenate([ids, oods]), np.repeat([0, 1], [len(ids), len(oods)])
    ranked, labels = torch.from_numpy(scores), torch.from_numpy(-is_ood)  # negative: OOD
    assert found.auroc == pytest.approx(roc_auc_score(is_ood, scores), abs=1e-9)
    assert found.auroc == pytest.approx(reference.auroc(ranked, labels).item(), abs=1e-6)
    false, true, _ = roc_curve(is_ood, scores, drop_intermediate=False)
    assert found.fpr95_ood == pytest.approx(false[np.argmax(true >= 0.95)], abs=1e-9)
    assert found.fpr95_ood == pytest.approx(reference.fpr_at_tpr(ranked, labels).item(), abs=1e-6)
    assert found.fpr95 == pytest.approx(reference.fpr_at_tpr(-ranked, -labels - 1).item(), abs=1e-6)
    assert found.aupr_in == pytest.approx(reference.aupr(ranked, labels, positive="id").item(), abs=1e-6)
    assert found.aupr_out == pytest.approx(reference.aupr(ranked, labels, positive="ood").item(), abs=1e-6)


def test_a_row_alone_and_constant_rows(parts, apply_head):
    """One sample, and samples that are all alike, are scored as any others are."""
    one = {"train": parts["train"], "select": parts["select"], "ood": parts["ood"].take(slice(0, 1))}
    alike = replace(parts["id"].take(slice(0, 3)), features=np.repeat(parts["id"].features[:1], 3, axis=0))
    for name in ("react", "vra", "dice", "gen", "entropy"):
        scores = ours(name, one | {"id": alike})
        assert len(set(scores[:3])) == 1
        whole = ours(name, parts)
        np.testing.assert_allclose(scores[[0, 3]], whole[[0, len(parts["id"])]], rtol=1e-5, atol=1e-6)
