"""Descriptions that somebody made up: refused before a byte is used, with an error of ours and never a crash."""

import shutil

import pytest

from cache import (
    CacheDamagedError,
    CacheError,
    CacheInvalidError,
    CacheMismatchError,
    FeatureCache,
    Manifest,
    restore_manifest,
    sha256,
    unseal,
)
from cache.files import read_versioned, write_versioned
from cache.unfinished import BuildPlan
from tests.test_cache.toy import begin, commit, files, fill, make_inputs, make_spec

HOSTILE = {
    "path traversal": lambda body: body["shards"][0].update(name="../../etc/passwd"),
    "another shard's name": lambda body: body["shards"][0].update(name="shard-00001.h5"),
    "rows that lie": lambda body: body["shards"][0].update(rows=10**9),
    "one row too many": lambda body: body.update(n_rows=body["n_rows"] + 1),
    "a negative count": lambda body: body["shards"][0].update(rows=-1),
    "a shape that lies": lambda body: body["spec"].update(cls_dim=10**7),
    "a shape of another kind": lambda body: body["spec"].update(grid=["2", 3]),
    "a shard twice": lambda body: body["shards"].append(body["shards"][-1]),
    "no shard": lambda body: body["shards"].clear(),
    "shards of another kind": lambda body: body.update(shards={}),
    "a shard of another kind": lambda body: body["shards"].insert(0, 3),
    "a boolean count": lambda body: body["shards"][0].update(start=False),
    "a digest of another kind": lambda body: body.update(inputs_sha256="x"),
    "an unknown key": lambda body: body.update(run="rm"),
    "a missing key": lambda body: body.pop("dataset"),
    "a set name with a path": lambda body: body.update(dataset="../x"),
    "class names of another kind": lambda body: body.update(class_names=[1]),
    "files left out of another kind": lambda body: body.update(left_out=[".txt"]),
    "files left out that are none": lambda body: body.update(left_out={".txt": 0}),
    "files left out that are no count": lambda body: body.update(left_out={".txt": True}),
    "another schema": lambda body: body.update(schema=2),
    "absurd sizes": lambda body: (
        body["shards"][-1].update(rows=10**20, nbytes=10**30, input_stop=body["n_inputs"] + 10**20 - 2),
        body.update(n_rows=body["n_rows"] + 10**20 - 2, n_inputs=body["n_inputs"] + 10**20 - 2),
    ),
    "settings of another kind": lambda body: body.update(made_with={"resumed_with": 3}),
}
TEXTS = {
    "a key twice": lambda text: text.replace('"n_rows"', '"n_rows": 1,\n"n_rows"'),
    "NaN": lambda text: text.replace('"torch":"2.14"', '"torch":NaN'),
    "infinity": lambda text: text.replace('"torch":"2.14"', '"torch":-Infinity'),
    "a number of 10,000 digits": lambda text: text.replace('"torch":"2.14"', f'"torch":{"9" * 10_000}'),
    "deep nesting": lambda text: text.replace('"torch":"2.14"', f'"torch":{"[" * 10**5}{"]" * 10**5}'),
    "half a character": lambda text: text.replace('"torch":"2.14"', '"torch":"\\ud800"'),
    "a list": lambda text: "[]",
}


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("cache") / "pets")


def sign(path, text):
    """Write a document with a digest that fits, whatever its text."""
    path.write_bytes(b'{"digest": "%s",\n%s' % (sha256(text.encode()).encode(), text.encode()))


def unsigned(path):
    return path.read_text(encoding="utf-8").partition("\n")[2]


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_manifest_is_refused(sealed, tmp_path, change):
    body = read_versioned(sealed.path / "manifest.json")
    change(body)
    write_versioned(tmp_path / "manifest.json", body)
    with pytest.raises(CacheInvalidError):
        FeatureCache.open(tmp_path)
    (tmp_path / "manifest.copy.json").write_bytes((tmp_path / "manifest.json").read_bytes())
    for use in (FeatureCache.open, restore_manifest, lambda path: unseal(path, [])):  # what both say is no accident
        with pytest.raises(CacheInvalidError):
            use(tmp_path)


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_copy_is_not_put_back(sealed, tmp_path, change):
    body = read_versioned(sealed.path / "manifest.json")
    change(body)
    write_versioned(tmp_path / "manifest.copy.json", body)
    with pytest.raises(CacheDamagedError, match="delete the cache"):
        restore_manifest(tmp_path)
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("change", TEXTS.values(), ids=TEXTS)
def test_hostile_text_is_refused(sealed, tmp_path, change):
    for name in ("manifest.json", "plan.json"):
        path = tmp_path / name.replace(".", "-")
        begin(path).close()
        text = unsigned((path if name == "plan.json" else sealed.path) / name)
        if name == "plan.json":
            text = text.replace('"shards": ', '"n_rows": 1,\n"shards": ')
        assert change(text) != text
        sign(path / name, change(text))
        with pytest.raises(CacheInvalidError):
            Manifest.read(path) if name == "manifest.json" else begin(path)


PLANS = {
    "a shard far away": lambda body: body["shards"][-1].__setitem__(1, 10**30),
    "shards of another kind": lambda body: body.update(shards=[["0", 4]]),
    "a shard too long": lambda body: body["shards"].insert(0, [0, 1, 2]),
    "shards from nowhere": lambda body: body.update(shards=[[-5, 23]]),
    "a set name with a path": lambda body: body.update(dataset="../x"),
    "a shape that lies": lambda body: body["spec"].update(cls_dim=2**60),
    "inputs of another kind": lambda body: body["inputs"].update(ids=[1]),
    "class names of another kind": lambda body: body.update(class_names=[[1]]),
    "settings of another kind": lambda body: body.update(made_with={"resumed_with": [1]}),
    "an unknown key": lambda body: body.update(run="rm"),
}


@pytest.mark.parametrize("adopt", [False, True])
@pytest.mark.parametrize("change", PLANS.values(), ids=PLANS)
def test_a_hostile_plan_is_refused(tmp_path, change, adopt):
    path = tmp_path / "pets"
    with begin(path) as builder:
        plan = builder.pending()[0]
        commit(path, make_spec(), make_inputs(), plan)
    body = read_versioned(path / "plan.json")
    change(body)
    write_versioned(path / "plan.json", body)
    try:
        begin(path, adopt=adopt).close()
    except (CacheInvalidError, CacheMismatchError):
        return
    assert adopt  # only what is part of the plan asked for is taken over
    assert BuildPlan.read(path).shards == builder.plan.shards


RECORDS = {
    "a shard that is another": lambda body: body.update(start=4, stop=8),
    "rows that lie": lambda body: body.update(rows=10**30),
    "bytes that lie": lambda body: body.update(nbytes=10**30),
    "failures far away": lambda body: body.update(failed=[10**30]),
    "failures of another kind": lambda body: body.update(failed=["a"], failures=[1]),
    "failures that are not listed": lambda body: body.update(failed=[0, 1, 2, 3]),
    "digests of another kind": lambda body: body.update(digests="xyz"),
    "digests of fewer": lambda body: body.update(digests=""),
    "a missing key": lambda body: body.pop("inputs"),
}


@pytest.mark.parametrize("change", RECORDS.values(), ids=RECORDS)
def test_a_hostile_record_is_a_shard_that_is_made_again(sealed, tmp_path, change):
    path = tmp_path / "pets"
    with begin(path) as builder:
        for plan in builder.pending():
            commit(path, make_spec(), make_inputs(), plan)
    body = read_versioned(path / "shard-00000.json")
    change(body)
    write_versioned(path / "shard-00000.json", body)
    with begin(path) as builder:
        assert [plan.index for plan in builder.pending()] == [0]
    assert files(fill(path).path) == files(sealed.path)


def test_rows_that_the_shards_do_not_have_are_found_at_read(sealed, tmp_path):
    """A manifest that agrees with itself, but not with its shards."""
    for more in (1, 10**11):
        path = shutil.copytree(sealed.path, tmp_path / str(more))
        body = read_versioned(path / "manifest.json")
        last = body["shards"][-1]
        last.update(rows=last["rows"] + more, nbytes=last["nbytes"] + more * 100, input_stop=last["input_stop"] + more)
        body.update(n_rows=body["n_rows"] + more, n_inputs=body["n_inputs"] + more)
        write_versioned(path / "manifest.json", body)
        cache = FeatureCache.open(path)
        with pytest.raises(CacheError, match="run verify"):
            cache.read("cls")
        with pytest.raises(CacheError, match="run verify"):
            list(cache.batches(["cls"], batch_size=100, seed=0))
        assert {damage.file for damage in cache.verify()} == {last["name"], "manifest.copy.json"}


@pytest.mark.parametrize("text", [b"", b"{}", b"[" * 10**5, b'{"digest": "00"}', b"\xff\xfe", b"null"])
def test_a_manifest_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(CacheInvalidError):
        Manifest.read(tmp_path)


def test_shards_of_another_cache_are_refused(sealed, tmp_path):
    """A manifest and shards that do not belong together: shapes are compared before a byte is used."""
    cache = FeatureCache.open(shutil.copytree(sealed.path, tmp_path / "mixed"))
    other = fill(tmp_path / "other", spec=make_spec(dtype="float32"))
    shutil.copy(other.path / "shard-00000.h5", cache.path)
    with pytest.raises(CacheDamagedError, match=r"cls is float32 \(3, 6\), not as sealed"):
        cache.read("cls")
