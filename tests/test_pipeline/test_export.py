"""`export` and what it leaves: one file that says of an image, anywhere, what the study says of it."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from stages.detection import Detector
from stages.detection.bundle import read_bundle, write_bundle
from stages.detection.deciding import DecidingDetector
from stages.detection.golden import calibration_deviation, golden_rows
from stages.detection.onnx_runtime import load_onnx_runtime
from stages.detection.proof import prove_runtime
from stages.detection.torch_runtime import load_runtime
from stages.errors import InputError, StageError
from tests.test_docs.pages import page_with
from tests.test_pipeline.command import done, pipeline, refused, settings
from tests.test_pipeline.served import Served
from tests.test_pipeline.tiny import STUDY, draw

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A study of two experts that are copies of the network's end, scored; and its detector."""
    home = tmp_path_factory.mktemp("export")
    draw(home / "images" / "train", "sklearn:digits[0-2]/train", 24)
    draw(home / "images" / "test", "sklearn:digits[0-2]/test", 8)
    draw(home / "images" / "threes", "sklearn:digits[3]/test", 6, nested=False)
    draw(home / "images" / "photos", "sklearn:photos", 4)
    (home / "tiny.toml").write_text(STUDY.replace("photos.tar", "photos"))
    for verb in ("extract", "train", "score"):
        done(verb, home / "tiny.toml")
    done("export", home / "tiny.toml", "-o", home / "tiny.ood")
    return home


@pytest.fixture(scope="module")
def detector(home):
    return Detector.load(home / "tiny.ood")


@pytest.fixture(scope="module")
def images(home):
    return sorted((home / "images" / "test").rglob("*.png"))


@pytest.fixture(scope="module")
def scored(detector, images):
    return detector.score(images, nearest=3)


def test_it_says_of_an_image_what_the_samples_say(home, images, scored):
    (path,) = (home / "work" / "scores" / "samples").glob("pretrained-mofe-refit-default-0-predicted.parquet")
    samples = pq.read_table(path).to_pandas().set_index(["set", "id"]).loc["test"]
    own = samples.loc[[path.relative_to(home / "images" / "test").as_posix() for path in images]]
    np.testing.assert_allclose(scored.score, own["knn+energy"], atol=1e-4)
    assert scored.prediction.tolist() == own["prediction"].tolist()
    assert scored.expert.tolist() == own["expert"].tolist()
    entries = json.loads((home / "work" / "scores" / "thresholds.json").read_text())
    (entry,) = (
        entry
        for entry in entries
        if (entry["score"], entry["head"], entry["features"]) == ("knn+energy", "refit", "mofe")
        and (entry["admit"], entry["routing"], entry["calibrated"]) == (0.95, "predicted", False)
    )
    assert scored.decision.tolist() == ["ID" if score <= entry["threshold"] else "OOD" for score in own["knn+energy"]]


@pytest.fixture(scope="module")
def by_study(home):
    """What the study predicts of the test images, together."""
    return done("predict", home / "tiny.toml", home / "images" / "test", "--fdr", "0.1").out


def test_predict_shows_what_is_shipped(by_study, scored):
    rows = list(csv.DictReader(io.StringIO(by_study)))
    np.testing.assert_array_equal(np.float32([row["score"] for row in rows]), scored.score)
    assert [float(row["p_value"]) for row in rows] == scored.p_value.tolist()
    assert [row["decision"] for row in rows] == scored.decision.tolist()
    assert [row["nearest_2"] for row in rows] == scored.nearest.ids[:, 1].tolist()


def test_predict_and_watch_take_the_file_itself(home, images, scored, by_study):
    given = home / "images" / "test"
    assert done("predict", home / "tiny.ood", given, "--fdr", "0.1").out == by_study
    said = json.loads(done("predict", home / "tiny.ood", images[0], "--format", "json").out)
    assert (
        said["detector"]
        == json.loads(done("predict", home / "tiny.toml", images[0], "--format", "json").out)["detector"]
    )
    watched = done("watch", home / "tiny.ood", given)
    assert [json.loads(line)["score"] for line in watched.out.splitlines()] == scored.score.tolist()
    assert watched.err.splitlines()[-1].endswith(
        "nearly: the calibration scores are on scales that they set; --strict makes it exact"
    )
    assert done("watch", home / "tiny.ood", given, "--strict").err.endswith("with probability 0.01 at most, exactly\n")


def test_what_does_not_go_with_an_exported_file_is_said(home, images):
    own = ("predict", home / "tiny.ood", images[0])
    assert "--score chooses among the scores of a study" in refused(*own, "--score", "knn")
    assert "--backbone chooses among those of a study" in refused(*own, "--backbone", "finetuned")
    assert "is an exported detector" in refused(*own, *settings("a=1"))
    assert "it has no model.onnx: export it with --onnx" in refused(*own, "--runtime", "onnx")
    assert "--runtime is of exported detectors" in refused(
        "predict", home / "tiny.toml", images[0], "--runtime", "onnx"
    )


def test_neither_number_nor_order_matter(detector, images, scored):
    np.testing.assert_array_equal(detector.score(images[::-1]).score[::-1], scored.score)
    np.testing.assert_array_equal(detector.score(images * 3).score[24:48], scored.score)
    alone = np.concatenate([detector.score(path).score for path in images[::5]])
    np.testing.assert_allclose(alone, scored.score[::5], atol=1e-5)


def test_images_come_in_many_forms(detector, images, scored):
    pil = [Image.open(path) for path in images[:4]]
    pixels = [np.array(image.convert("RGB")) for image in pil]
    loader = torch.utils.data.DataLoader(
        [(torch.from_numpy(each).movedim(2, 0), 0) for each in pixels], batch_size=3, shuffle=False
    )
    forms = [map(str, images[:4]), pil, pixels, np.stack(pixels), loader, [path.read_bytes() for path in images[:4]]]
    for form in forms:
        np.testing.assert_array_equal(detector.score(form).score, scored.score[:4])
    prepared = np.stack([detector.prepare(path) for path in images[:4]])
    assert prepared.dtype == np.uint8
    np.testing.assert_array_equal(detector.score_prepared(prepared).score, scored.score[:4])
    assert len(detector.score([])) == 0


def test_features_are_scored_as_images_are(home, detector, images, scored):
    from cache import FeatureCache

    (folder,) = (home / "caches").glob("test-*")
    cache = FeatureCache.open(folder)
    found = detector.score({name: cache.read(name) for name in cache.spec.datasets() if name != "registers"})
    by_id = dict(zip(cache.ids, found.score, strict=True))
    own = [by_id[path.relative_to(home / "images" / "test").as_posix()] for path in images]
    np.testing.assert_array_equal(own, scored.score)


def test_what_is_no_image_is_named(detector, images, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"^image 1 \(.*broken\.png\): cannot be used: not an image"):
        detector.score([images[0], tmp_path / "broken.png"])
    with pytest.raises(InputError, match=r"^image 0: cannot be used: already transformed"):
        detector.score([np.zeros((3, 32, 32), np.float32)])
    with pytest.raises(InputError, match="a int given"):
        detector.score(3)


def test_only_what_was_prepared_is_taken_as_prepared(detector, images, scored):
    pixels = np.stack([detector.prepare(image) for image in images[:2]])
    np.testing.assert_allclose(detector.score_prepared(pixels[::-1]).score[::-1], scored.score[:2], atol=1e-5)
    for other in (pixels[:, :, :20, :20], pixels[0], pixels.astype(np.float32) / 255):
        with pytest.raises(
            InputError, match=r"^pixels: .* given, must be uint8 \[n, 3, 32, 32\], as prepare makes them"
        ):
            detector.score_prepared(other)


def test_so_many_of_the_nearest_are_a_whole_number(detector, images):
    assert detector.score(images[0], nearest=np.int64(2)).nearest.ids.shape == (1, 2)
    for other in (True, -1, 1.5, "3", 10**9, 10**30):
        with pytest.raises(InputError, match=r"nearest: .* given, must be a whole number from 0 to 10000"):
            detector.score(images[0], nearest=other)


def test_a_file_that_is_no_detector_is_not_written_over(home, tmp_path):
    other = shutil.copy(home / "tiny.toml", tmp_path / "pets.toml")
    assert (
        refused("export", other, "-o", other)
        == f"-o {other}: is there and no detector: give another name, such as pets.ood"
    )
    assert other.read_text() == (home / "tiny.toml").read_text()
    assert f"{tmp_path}/new/ is meant as a folder; give a file" in refused("export", other, "-o", f"{tmp_path}/new/")


def test_it_is_used_as_shown(home, images, scored, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pets.ood").symlink_to(home / "tiny.ood")
    for name, image in (("new.jpg", images[0]), ("other.jpg", images[1])):
        Path(name).write_bytes(image.read_bytes())
    with redirect_stdout(io.StringIO()) as out:
        exec(page_with("detector").code("detector"), {})
    assert out.getvalue().startswith(f"{scored.decision[0]} {round(scored.p_value[0], 3)} {scored.prediction[0]}\n")


def test_two_exports_are_the_same_bytes(home, tmp_path):
    done("export", home / "tiny.toml", "-o", tmp_path / "again.ood")
    assert (tmp_path / "again.ood").read_bytes() == (home / "tiny.ood").read_bytes()
    assert str(home).encode() not in (tmp_path / "again.ood").read_bytes()  # no place on this machine


def test_it_starts_in_seconds_with_no_library_of_the_laboratory(home, images, scored):
    """In a process of its own, in another folder; seconds are those of the processor."""
    command = [sys.executable, "-m", "tests.test_pipeline.starting", home / "tiny.ood", "32", *images[:3]]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, check=True)
    said = json.loads(run.stdout)
    np.testing.assert_allclose(np.float32(said["scores"]), scored.score[:3], atol=1e-5)
    assert said["laboratory"] == []
    assert said["beyond_cpu_s"] < 2


def test_info_says_where_it_came_from(home):
    lines = done("info", home / "tiny.ood").out.splitlines()
    table = json.loads((home / "work" / "scores" / "table.json").read_text())
    (row,) = (
        row
        for row in table
        if (row["features"], row["head"], row["score"], row["ood"]) == ("mofe", "refit", "knn+energy", "threes")
        and (row["routing"], row["calibrated"]) == ("predicted", False)
    )
    said = {line.split()[0]: line for line in lines}
    assert "tiny: knn+energy by head refit, pretrained, mofe features, default, seed 0" in said["study"]
    assert "tf_efficientnet_lite0 at 32 px" in said["network"]
    assert any(f"threes (near, 6 images): AUROC {row['auroc']:.3f} ({row['auroc_lo']:.3f}" in line for line in lines)
    assert [line for line in lines if line.startswith("unknown")] == [
        "unknown    images of other sources than threes, photos"
    ]
    assert len([line for line in lines if line.startswith("set ")]) == 4


def test_what_was_not_measured_is_said(home, tmp_path):
    done("export", home / "tiny.toml", "-o", tmp_path / "it.ood", "--score", "mahalanobis", "--variant", "none")
    lines = done("info", tmp_path / "it.ood").out.splitlines()
    assert "unknown    photos: scores are none of mahalanobis with this model" in lines
    assert Detector.load(tmp_path / "it.ood").score(next((home / "images").rglob("*.png"))).expert is None


def test_without_the_backbone_it_is_loaded_from_where_the_study_has_it(home, images, scored, tmp_path):
    done("export", home / "tiny.toml", "-o", tmp_path / "it.ood", "--no-backbone")
    assert (tmp_path / "it.ood").stat().st_size < (home / "tiny.ood").stat().st_size / 2
    np.testing.assert_array_equal(Detector.load(tmp_path / "it.ood").score(images).score, scored.score)


def test_what_was_made_on_a_gpu_runs_here_in_passes_of_this_device(home, images, scored, tmp_path):
    bundle = read_bundle(home / "tiny.ood")
    compute = bundle.parts.spec["compute"] | {"device": "cuda", "batch": 256, "tf32": False}
    parts = replace(bundle.parts, spec=bundle.parts.spec | {"compute": compute})
    write_bundle(tmp_path / "it.ood", replace(bundle, parts=parts))
    detector, seen = Detector.load(tmp_path / "it.ood"), []
    encode = detector.runtime._encoder.backbone.encode
    detector.runtime._encoder.backbone.encode = lambda batch: (seen.append(len(batch)), encode(batch))[1]
    np.testing.assert_allclose(detector.score(images[:1]).score, scored.score[:1], atol=1e-5)
    assert seen == [16]


@pytest.mark.parametrize(("precision", "allowed"), [("float32", 1e-4), ("bfloat16", 2.5)])
def test_half_precision_may_differ_by_its_rounding(home, tmp_path, precision, allowed):
    """Golden rows of another device, as far as they show here: scores that are just near enough, or just too far."""
    bundle = read_bundle(home / "tiny.ood")
    compute = bundle.parts.spec["compute"] | {"precision": precision}
    half = replace(bundle, parts=replace(bundle.parts, spec=bundle.parts.spec | {"compute": compute}))
    detector = Detector(half.parts, load_runtime(half.parts, half.weights, "cpu"))
    unit = calibration_deviation(detector)
    images = np.stack([detector.prepare(pixels) for pixels in bundle.golden.images])
    own = detector.score_prepared(images)
    for share, is_refused in ((0.9, False), (1.1, True)):
        score, decision = own.score + np.float32(share * allowed * unit), tuple(own.decision.tolist())
        write_bundle(tmp_path / "it.ood", replace(half, golden=replace(bundle.golden, score=score, decision=decision)))
        if not is_refused:
            Detector.load(tmp_path / "it.ood")
            continue
        with pytest.raises(InputError, match="scored otherwise here") as refusal:
            Detector.load(tmp_path / "it.ood")
        assert ('precision = "float32"' in str(refusal.value)) == (precision != "float32")


def test_of_half_precision_all_but_its_rounding_is_held_as_of_float32(home, tmp_path):
    """Heads that are off by less than what rounding may do are found, for the network is asked in float32 as well."""
    bundle = read_bundle(home / "tiny.ood")
    compute = bundle.parts.spec["compute"] | {"precision": "bfloat16"}
    parts = replace(bundle.parts, spec=bundle.parts.spec | {"compute": compute})
    detector = Detector(parts, load_runtime(parts, bundle.weights, "cpu"))
    named = list(zip(bundle.golden.sets, bundle.golden.ids, strict=True))
    half = replace(bundle, parts=parts, golden=golden_rows(detector, named, bundle.golden.images, None))
    assert (half.golden.values["score in float32"] != half.golden.score).any()
    write_bundle(tmp_path / "it.ood", half)
    Detector.load(tmp_path / "it.ood")
    head = parts.heads["refit"]
    other = {"refit": replace(head, bias=head.bias + np.float32([0, 0, 0.01]))}
    write_bundle(tmp_path / "it.ood", replace(half, parts=replace(parts, heads=other)))
    with pytest.raises(InputError, match=r"otherwise here than where it was made, in float32 too: of '.*' a score is"):
        Detector.load(tmp_path / "it.ood")


def test_mistakes_are_said_before_work(home, tmp_path):
    export = ("export", home / "tiny.toml", "-o")
    assert "--variant: 'dens' is none of default, none" in refused(*export, tmp_path / "it.ood", "--variant", "dens")
    assert "did you mean 'energy'" in refused(*export, tmp_path / "it.ood", "--score", "enrgy")
    assert "give a file in a folder that is there" in refused(*export, tmp_path / "no" / "it.ood")
    assert "finetune: missing" in refused(*export, tmp_path / "it.ood", "--backbone", "finetuned")
    moved = settings(f"sets.photos.images={home / 'images' / 'threes'}")
    assert "run make extract" in refused(*export, tmp_path / "it.ood", *moved)
    assert refused("info", home / "tiny.ood", *settings("a=1")).endswith("tiny.ood is an exported detector")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_one_line(home, tmp_path):
    data = (home / "tiny.ood").read_bytes()
    (tmp_path / "it.ood").write_bytes(data[: len(data) // 2])
    assert "it.ood: damaged, or changed: " in refused("info", tmp_path / "it.ood")


@pytest.mark.parametrize(
    ("name", "damaged", "said"),
    [
        ("it.ood", lambda data: b"", "is no detector bundle as `export` writes it: it is empty"),
        ("it.ood", lambda data: data[:20], "damaged, or changed: truncated: 20 bytes"),
        ("it.ood", lambda data: b"XXXX" + data[4:], "is no detector bundle as `export` writes it: it does not begin"),
        ("it.ood", lambda data: STUDY.encode(), "is no detector bundle as `export` writes it: it does not begin as"),
        ("it.ood", lambda data: data[:900], "damaged, or changed: its manifest does not end"),
        ("it.ood", lambda data: None, "cannot be read: No such file or directory"),
        ("it.bin", lambda data: data[:-1], "damaged, or changed: truncated"),  # known by how it begins
        ("it.bin", lambda data: b"XXXX" + data[4:], "is no detector bundle as `export` writes it: it"),  # and ends
    ],
)
def test_what_is_given_as_a_detector_and_is_none_is_said_by_every_verb(home, images, tmp_path, name, damaged, said):
    given = tmp_path / name
    if (data := damaged((home / "tiny.ood").read_bytes())) is not None:
        given.write_bytes(data)
    verbs = (("info",), ("predict", images[0]), ("watch", home / "images" / "test"), ("watch", "-"), ("serve",))
    for verb, *rest in verbs:
        assert refused(verb, given, *rest).startswith(f"{given}: {said}")
    with pytest.raises(InputError) as refusal:
        Detector.load(given)
    assert str(refusal.value).startswith(f"{given}: {said}")
    assert refused("run", given).endswith("given as an exported detector, and run takes an experiment's TOML file")


# ------------------------------------------------------------------------------------------------------ by ONNX Runtime


@pytest.fixture(scope="module")
def onnx_export(home):
    """The same detector with its network as a graph, and without the weights that torch reads; and what was said."""
    pytest.importorskip("onnx", reason="needs the extra export")
    pytest.importorskip("onnxruntime", reason="needs the extra export")
    said = done("export", home / "tiny.toml", "-o", home / "onnx.ood", "--onnx", "--no-backbone").out
    return home / "onnx.ood", said


@pytest.fixture(scope="module")
def onnx_file(onnx_export):
    return onnx_export[0]


WITHOUT_TORCH = """
import sys
from stages.detection import Detector
found = Detector.load(sys.argv[1], runtime="onnx").score(sys.argv[2:], nearest=1)
assert not {"torch", "torchvision", "timm", "onnx"} & sys.modules.keys()
for row in zip(found.score, found.decision, found.prediction, found.expert, found.nearest.ids[:, 0]):
    print(*row, sep="|")
"""


def test_by_onnx_it_scores_without_torch(onnx_file, images, scored, detector):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", WITHOUT_TORCH, onnx_file, *images]
    run = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = [line.split("|") for line in run.stdout.splitlines()]
    score, decision, prediction, expert, nearest = map(list, zip(*rows, strict=True))
    np.testing.assert_allclose(np.float32(score), scored.score, atol=1e-3 * detector.parts.calibration.scores.std())
    assert decision == scored.decision.tolist()
    assert prediction == scored.prediction.tolist()
    assert [int(each) for each in expert] == scored.expert.tolist()
    assert nearest == scored.nearest.ids[:, 0].tolist()


def test_by_onnx_verbs_say_the_same(onnx_file, home, images):
    scored = Detector.load(onnx_file, runtime="onnx").score(images).score.tolist()
    given = (onnx_file, home / "images" / "test", "--runtime", "onnx")
    rows = list(csv.DictReader(io.StringIO(done("predict", *given).out)))
    assert [float(row["score"]) for row in rows] == pytest.approx(scored, abs=1e-6)
    assert [json.loads(line)["score"] for line in done("watch", *given).out.splitlines()] == scored


def test_by_onnx_it_is_served_without_torch(onnx_file, images):
    scored = Detector.load(onnx_file, runtime="onnx").score(images[:1])
    server = Served(onnx_file, "--runtime", "onnx")
    try:
        status, answer = server.score(images[0].read_bytes())
        assert (status, answer["score"], answer["expert"]) == (200, scored.score[0], scored.expert[0])
        assert server.ask("GET", "/info")[1]["runtime"] == "onnx"
        if sys.platform == "linux":  # elsewhere a process's libraries are told to nobody else
            loaded = {Path(each.path).name for each in server.worker().memory_maps()}
            assert not [name for name in loaded if name.startswith("libtorch")]
            assert [name for name in loaded if name.startswith("onnxruntime")]
        server.tell(signal.SIGTERM)
        assert server.finish()[0] == 0
    finally:
        server.kill()


def test_by_onnx_neither_number_nor_order_matter(onnx_file, images):
    detector = Detector.load(onnx_file, runtime="onnx")
    prepared = np.stack([detector.prepare(path) for path in images])
    together, alone = detector.runtime.run(prepared), detector.runtime.run(prepared[3:4])
    np.testing.assert_array_equal(alone.refined.features, together.refined.features[3:4])
    np.testing.assert_array_equal(alone.stored["cls"], together.stored["cls"][3:4])
    scored = detector.score(images).score
    np.testing.assert_array_equal(detector.score(images[::-1]).score[::-1], scored)
    with pytest.raises(InputError, match='runtime="torch" for features'):
        detector.score_features(np.zeros((1, 1280), np.float32))


def test_it_is_said_what_a_graph_has_shown(home, onnx_export):
    path, said = onnx_export
    n_images = len(list((home / "images").rglob("*.png")))
    assert f"\nmodel.onnx: {n_images} images in passes of 1, 2, 33 are decided as by torch, scores at most " in said
    assert 'runtime="onnx") runs without torch' in done("info", path).out
    assert not [place for place in (home, ROOT, sys.prefix) if str(place).encode() in path.read_bytes()]


def test_a_file_without_a_graph_or_with_a_damaged_one_is_refused(home, onnx_file, tmp_path):
    with pytest.raises(InputError, match=r"tiny\.ood: it has no model\.onnx: export it with --onnx"):
        Detector.load(home / "tiny.ood", runtime="onnx")
    bundle = read_bundle(onnx_file)
    for graph in (b"no graph", bundle.graph[: len(bundle.graph) // 2]):
        write_bundle(tmp_path / "it.ood", replace(bundle, graph=graph))
        with pytest.raises(InputError, match=r"it\.ood: model\.onnx: is damaged, or truncated$"):
            Detector.load(tmp_path / "it.ood", runtime="onnx")


@pytest.fixture(scope="module")
def mistaken(onnx_file):
    """A graph as an exporter with a mistake would make it: one convolution is off by 1 %."""
    import onnx

    model = onnx.load_from_string(read_bundle(onnx_file).graph)
    weights = next(each for each in model.graph.initializer if len(each.dims) == 4)
    array = onnx.numpy_helper.to_array(weights) * np.float32(1.01)
    weights.CopyFrom(onnx.numpy_helper.from_array(array, weights.name))
    return model.SerializeToString()


def test_a_graph_that_scores_otherwise_is_not_written(home, mistaken, tmp_path, monkeypatch):
    monkeypatch.setattr(DecidingDetector, "graph", lambda _deciding: mistaken)
    answer = pipeline("export", home / "tiny.toml", "-o", tmp_path / "it.ood", "--onnx")
    assert answer.status == 1
    assert "it.ood: not written, for what was written does not score as the study: " in answer.err
    assert list(tmp_path.iterdir()) == []


def test_a_proof_finds_what_scores_otherwise(detector, onnx_file, mistaken, images):
    files = [(path.name, path.read_bytes()) for path in images[:5]] + [("no image", b"no image")]
    shown = prove_runtime(detector, Detector.load(onnx_file, runtime="onnx").runtime, files)
    assert shown.images == 5
    assert 0 <= shown.away < 1e-3
    other = load_onnx_runtime(detector.parts, mistaken)
    with pytest.raises(StageError, match=r"^onnx does not score as torch does: of '.*\.png' in passes of 1 the "):
        prove_runtime(detector, other, files)
