"""One file holds a detector: the same scores to the bit, and whatever else stands in it is one line.

The detectors are of drawn features, which need no network.
"""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load, save

from stages.config import ScoreConfig
from stages.detection import Detector
from stages.detection.bundle import read_about, read_bundle, write_bundle
from stages.detection.deciding import DecidingDetector
from stages.errors import InputError, StageError
from stages.export import GoldenSamples, export_detector, spread
from stages.files.archive import SealedArchive, write_archive
from stages.files.bundle_file import BUNDLE_KIND, BUNDLE_VERSION
from tests.test_stages.drawn_studies import World, make_study

CONFIG = ScoreConfig(k=3)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return make_study(World(0, classes=4), 200, tmp_path_factory.mktemp("study"), fresh=20)


@pytest.fixture(scope="module")
def rows(study):
    return study.fresh.read("cls")


def samples(rows, n=40):
    own = spread(len(rows), n)
    return GoldenSamples([("fresh", str(row)) for row in own], None, {"cls": rows[own]})


def deciding_detector(study, score="knn+energy"):
    return DecidingDetector(study.source, CONFIG, score, "probe")


def exported(path, study, rows, score="knn+energy"):
    deciding = deciding_detector(study, score)
    export_detector(path, deciding, samples(rows), {"study": "drawn"})
    return deciding


@pytest.fixture(scope="module")
def written(study, rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "drawn.ood"
    exported(path, study, rows)
    return path


@pytest.mark.parametrize("score", ["knn", "mahalanobis", "vim", "temperature-scaling", "knn+nnguide"])
def test_it_scores_as_the_study_does_to_the_bit(study, rows, tmp_path, score):
    deciding = exported(tmp_path / "it.ood", study, rows, score)
    found = Detector.load(tmp_path / "it.ood")
    ours, theirs = found.score(rows, nearest=2), deciding.detector().score_features({"cls": rows}, nearest=2)
    for name in ("score", "p_value", "decision", "prediction"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    np.testing.assert_array_equal(ours.nearest.ids, theirs.nearest.ids)
    labels = np.full(len(rows), -1, np.int32)
    from stages.detection.frozen import FrozenFeatures

    table = deciding.fitted.score_rows(FrozenFeatures(study.source).rows(study.fresh, labels))
    np.testing.assert_array_equal(ours.score, table)


def test_what_it_says_is_what_its_threshold_and_calibration_rows_say(written, rows):
    detector = Detector.load(written)
    found = detector.score(rows, nearest=700)
    assert len(found) == len(rows) == 80
    assert set(found.decision) <= {"ID", "OOD"}
    np.testing.assert_array_equal(found.decision == "ID", found.score <= detector.threshold.threshold)
    np.testing.assert_array_equal(found.p_value <= 0.05, found.decision == "OOD")
    assert found.expert is None
    assert set(found.prediction) <= set(detector.class_names)
    ids = detector.parts.examples["none"].ids
    assert sorted(found.nearest.ids[0][: len(ids)]) == sorted(ids)
    assert (found.nearest.ids[:, len(ids) :] == "").all()
    assert np.isnan(found.nearest.distances[:, len(ids) :]).all()
    assert (np.diff(found.nearest.distances[:, : len(ids)]) >= 0).all()


def test_promises_may_be_per_class(written, rows):
    plain, grouped = Detector.load(written), Detector.load(written, per="class")
    assert (plain.score(rows).p_value != grouped.score(rows).p_value).any()
    with pytest.raises(InputError, match="needs a mixture of experts"):
        Detector.load(written, per="expert")


def test_neither_number_nor_order_matter(written, rows):
    detector = Detector.load(written)
    many = detector.score(rows).score
    np.testing.assert_allclose(detector.score(rows[::-1]).score[::-1], many, atol=1e-5)
    np.testing.assert_allclose([detector.score(row[None]).score[0] for row in rows], many, atol=1e-5)
    assert len(detector.score(rows[:0])) == 0


def test_two_exports_are_the_same_bytes_and_the_bank_stands_in_them_once(study, written, rows, tmp_path):
    exported(tmp_path / "again.ood", study, rows)
    assert (tmp_path / "again.ood").read_bytes() == written.read_bytes()
    bundle, archive = read_bundle(written), SealedArchive(written, BUNDLE_KIND, BUNDLE_VERSION)
    bank = bundle.parts.examples["none"].features
    assert bank.nbytes < len(archive.read("detector.safetensors")) < 2 * bank.nbytes
    assert read_about(written)[1] == {"study": "drawn"}


def test_a_detector_of_features_takes_no_images(written, rows, tmp_path):
    detector = Detector.load(written)
    with pytest.raises(InputError, match="takes features, not images"):
        detector.score(tmp_path / "cat.jpg")
    for given, said in [
        ({"tap_cls": rows}, "^features: cls is missing; this detector reads cls$"),
        ({"cls": rows, "dog": rows}, "^features: dog is none of cls$"),
        ({"cls": rows[:, :5]}, r"^features: cls has shape \[80, 5\], must be \[n, 8\]$"),
        ({"cls": rows * np.nan}, "^features: 80 rows of cls hold what is no finite float32$"),
    ]:
        with pytest.raises(InputError, match=said):
            detector.score_features(given)


def test_what_is_asked_wrongly_is_said(written, rows):
    for asked, said in [
        ({"runtime": "tf"}, "^runtime: 'tf' given, must be 'torch' or 'onnx'$"),
        ({"per": "klass"}, "^per: 'klass' given, must be 'all' or 'class' or 'expert'$"),
        ({"device": "gpu"}, "^device: 'gpu' given, must be 'auto', 'cpu' or 'cuda'$"),
        ({"device": "cuda:99"}, r"drawn\.ood: device: 'cuda:99' given, and torch finds (no|\d+) GPU here$"),
    ]:
        with pytest.raises(InputError, match=said):
            Detector.load(written, **asked)
    for k in (-1, 1.5, "3", None):
        with pytest.raises(InputError, match=r"^nearest: .* given, must be a whole number from 0 to 10000$"):
            Detector.load(written).score(rows, nearest=k)


def test_a_detector_that_scores_otherwise_is_not_started(written, tmp_path):
    bundle = read_bundle(written)
    head = bundle.parts.heads["probe"]
    other = replace(bundle.parts, heads={"probe": replace(head, bias=head.bias + np.arange(4, dtype=np.float32) / 100)})
    write_bundle(tmp_path / "other.ood", replace(bundle, parts=other))
    with pytest.raises(InputError, match=r"scored otherwise here.* off by .* deviations.*logits is the first"):
        Detector.load(tmp_path / "other.ood")
    golden = replace(bundle.golden, decision=("OOD", *bundle.golden.decision[1:]))
    write_bundle(tmp_path / "other.ood", replace(bundle, golden=golden))
    with pytest.raises(InputError, match=r"a decision is ID, was OOD: take the device"):
        Detector.load(tmp_path / "other.ood")


def test_what_does_not_prove_itself_is_not_kept(study, rows, tmp_path, written):
    deciding = deciding_detector(study)
    wrong = replace(deciding.parts, scales=replace(deciding.parts.scales, standardisers=()))
    deciding.__dict__["parts"] = wrong  # what the file will hold, while the golden rows are scored by …
    right = deciding_detector(study)
    deciding.detector = right.detector  # … the whole detector
    with pytest.raises(StageError, match="not written, for what was written does not score as the study"):
        export_detector(tmp_path / "it.ood", deciding, samples(rows), {})
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------- files of strangers


def opened(path):
    archive = SealedArchive(path, BUNDLE_KIND, BUNDLE_VERSION)
    return {name: archive.read(name) for name in archive.names}


def resealed(path, entries):
    write_archive(path, BUNDLE_KIND, BUNDLE_VERSION, entries)
    return path


def with_value(document, place, value):
    """A copy of a JSON document with another value at a place such as ``value/heads/probe``."""
    body = json.loads(json.dumps(document))
    *way, last = place.split("/")
    at = body
    for key in way:
        at = at[int(key)] if isinstance(at, list) else at[key]
    at[int(last) if isinstance(at, list) else last] = value
    return body


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("value/score", 1, r"detector\.json: score: 1 given"),
        ("value/more", 1, r"detector\.json: more: unknown key"),
        ("value/head", "refit", "head: 'refit' is not there"),
        ("value/class_names", ["one"], "class_names: 1 given, the head has 4 classes"),
        ("value/class_names", "abcd", r"class_names: abcd given, a list expected"),
        ("value/spec/cls_dim", 2**40, "spec: spec: cls_dim"),
        ("value/spec/cls_dim", 2**20, r"cls has shape \[\d+, 8\], must be \[n, 1048576\]"),
        ("value/spec/dtype", "object", "spec"),
        ("value/network", {"config": {"name": "../x"}, "expert_blocks": 1}, r"timm has no model '\.\./x'"),
        (
            "value/network",
            {"config": {"image_size": 10**9, "name": "resnet18"}, "expert_blocks": 1},
            r"network\.config\.image_size: .* less than or equal to 4096",
        ),
        ("value/mixture", {"groups": [0, 2**40]}, r"mixture\.\w+: missing"),
        ("value/scores/0/scorer/name", "os.system", "no score is called 'os.system'"),
        ("value/scores/0/scorer/name", "gmm", "gmm"),
        ("value/scores/0/scorer/settings", {"k": 3, "shell": "rm"}, r"knn\.shell: unknown setting"),
        ("value/scores/0/scorer/settings", {"k": -1}, r"knn\.k: -1 given"),
        ("value/scores/0/scorer/learnt", {}, "an array that nothing asks for"),
        ("value/scores/0/scorer/learnt/none/1/bank/index", "exec", "exec given"),
        ("value/scores/0/head", "none of these", r"scores: the head 'none of these' is not the detector's"),
        ("value/calibration/scores", "float64", "float32 stored as float64"),
        ("value/heads/probe/weight", "transposed float32", "features of shape|does not go together"),
        ("same", {"a": "b"}, "'a' is no array of another name"),
        ("same", [], "is not as it is written"),
    ],
)
def test_parts_that_lie_are_one_clear_error(written, tmp_path, place, value, said):
    entries = opened(written)
    document = with_value(json.loads(entries["detector.json"]), place, value)
    lying = resealed(tmp_path / "lying.ood", entries | {"detector.json": json.dumps(document).encode()})
    with pytest.raises(InputError) as raised:
        Detector.load(lying)
    assert str(raised.value).startswith(f"{lying}: ")
    assert "\n" not in str(raised.value)
    assert re.search(said, str(raised.value)), str(raised.value)


def test_entries_too_many_or_too_few_are_refused(written, tmp_path):
    entries = opened(written)
    more = resealed(tmp_path / "more.ood", entries | {"model.onnx": b""})
    with pytest.raises(InputError, match=r"holds model\.onnx, which is no part of a detector"):
        Detector.load(more)
    for name in ("about.json", "golden.json", "detector.safetensors"):
        fewer = resealed(tmp_path / "fewer.ood", {other: data for other, data in entries.items() if other != name})
        with pytest.raises(InputError, match=f"holds no {name}"):
            Detector.load(fewer)


def places(value, at=""):
    """Every place of a JSON document, leaves and what holds them."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in children:
        yield f"{at}{key}"
        yield from places(each, f"{at}{key}/")


JUNK = [None, True, -1, 2**63, 1e308, "", "../../x", [], {}, [[[]]], {"a": {}}, "float16", "transposed float32", 0, 7]


def outcome(path, rows):
    """Why a file is refused, or the scores that it gives."""
    try:
        return None, Detector.load(path).score(rows).score
    except InputError as error:
        return str(error), None


@pytest.mark.filterwarnings("ignore")  # numpy's, of numbers that mean nothing
def test_sealed_nonsense_is_refused_or_is_a_detector(written, rows, tmp_path, pytestconfig):
    """Anybody can seal a file: whatever it says ends in one line, or in scores."""
    entries, rng, refused = opened(written), np.random.default_rng(0), 0
    documents = {name: json.loads(entries[name]) for name in ("detector.json", "golden.json")}
    known = {name: list(places(document)) for name, document in documents.items()}
    n = pytestconfig.getoption("--mutants")
    for number in range(n):
        name = "detector.json" if number % 3 else "golden.json"
        changed = dict(entries)
        if number % 5 == 4:  # arrays: another shape or type, cut, or poisoned
            tensors = f"{name.removesuffix('.json')}.safetensors"
            arrays = load(entries[tensors])
            at = sorted(arrays)[int(rng.integers(len(arrays)))]
            array = arrays[at]
            ways = [array[:-1], array.reshape(-1), array[None], array.astype(np.float16), array * np.float32(np.nan)]
            arrays[at] = np.ascontiguousarray(ways[int(rng.integers(len(ways)))])
            changed[tensors] = save(arrays)
        else:
            place = known[name][int(rng.integers(len(known[name])))]
            junk = JUNK[int(rng.integers(len(JUNK)))]
            changed[name] = json.dumps(with_value(documents[name], place, junk)).encode()
        said, score = outcome(resealed(tmp_path / "it.ood", changed), rows)
        refused += said is not None
        if said is None:
            assert score.shape == (len(rows),)
            assert np.isfinite(score).all()
        else:
            assert said.startswith(f"{tmp_path / 'it.ood'}: ")
            assert len(said.splitlines()) == 1
    assert refused > n / 2
