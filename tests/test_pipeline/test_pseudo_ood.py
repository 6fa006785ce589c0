"""Images that play OOD for ``auto``: extracted once, beside the sets' caches, of ID images that only select."""

import shutil

import pytest

from pipeline.config import RunOptions, load_config
from pipeline.pseudo_ood import PseudoOOD
from pipeline.workspace import Workspace
from stages.inputs.images.pseudo_ood import PSEUDO_IMAGES
from tests.test_pipeline.command import done, pipeline, settings, snapshot
from tests.test_pipeline.tiny import ID_SETS, draw

EACH = 5


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study whose scores are the default ones, extracted."""
    home = tmp_path_factory.mktemp("home")
    draw(home / "images" / "train", "sklearn:digits[0-3]/train", 30)
    draw(home / "images" / "test", "sklearn:digits[0-3]/test", 2)
    (home / "study.toml").write_text(ID_SETS.replace("[cache]", f"[cache]\npseudo_ood = {EACH}\npatches = 'none'"))
    return home / "study.toml", done("extract", home / "study.toml").out


def found(path):
    workspace = Workspace(load_config(path), RunOptions())
    return workspace, PseudoOOD(workspace, workspace.pretrained)


def test_they_are_made_of_select_rows_alone(study):
    path, said = study
    workspace, pseudo = found(path)
    data, cache = workspace.pretrained.id_data(), pseudo.cache(workspace.pretrained.spec())
    assert cache.n_rows == pseudo.at_most == EACH * len(PSEUDO_IMAGES)
    assert f"{cache.n_rows} images that play OOD" in said
    of = {name.partition("/")[2] for name in cache.ids.tolist()}
    assert of <= set(data.train.ids[data.split.select].tolist())
    assert len(of) == EACH
    by_id = dict(zip(data.train.ids.tolist(), data.train_labels.tolist(), strict=True))
    samples = pseudo.samples()
    for content, name in zip(samples.contents, samples.ids, strict=True):
        other = next(name for name in by_id if content.of[1].path.endswith(name))
        assert by_id[name.partition("/")[2]] != by_id[other]


def test_they_are_extracted_once_and_again_where_they_are_gone_or_others_are_asked_for(study):
    path, _ = study
    workspace, pseudo = found(path)
    cache = pseudo.cache(workspace.pretrained.spec())
    before, digest = snapshot(cache.path), cache.digest
    assert "fresh" in done("extract", path).out
    assert snapshot(cache.path) == before
    assert f"{cache.n_rows} images, fresh" in done("extract", path, "--dry-run").out
    shutil.rmtree(cache.path)
    assert pseudo.cache(workspace.pretrained.spec()) is None
    assert f"{EACH * len(PSEUDO_IMAGES)} images that play OOD" in done("extract", path).out
    assert pseudo.cache(workspace.pretrained.spec()).digest == digest


def test_damage_is_found_and_repaired_as_of_any_cache(study):
    """Of a shard, which is extracted again, and of the manifest, which has a copy."""
    path, _ = study
    workspace, pseudo = found(path)
    cache = pseudo.cache(workspace.pretrained.spec())
    files = [cache.path / name for name in ("shard-00000.h5", "manifest.json")]
    before = [file.read_bytes() for file in files]
    for file, content in zip(files, before, strict=True):
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        answer = pipeline("verify", path)
        assert answer.status == 1
        assert str(cache.path) in answer.out
        assert "1 damaged files" in answer.err
        assert str(cache.path) in done("verify", path, "--repair").out
        assert [own.read_bytes() for own in files] == before


THREE_CLASSES = [f"sets.{name}.images=sklearn:digits[0-2]/{name}" for name in ("train", "test")]


@pytest.mark.parametrize("given", [["cache.pseudo_ood=0"], ['score.scores=["knn"]'], THREE_CLASSES])
def test_none_where_they_are_not_wanted(study, given):
    """Nor where classes are too few to be left out."""
    path, _ = study
    said = done("extract", path, "--dry-run", *settings(*given)).out
    assert "pseudo-ood" not in said
