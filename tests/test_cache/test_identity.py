"""Fingerprints, specs, plans and tables of inputs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache import CacheInvalidError, Failure, FeatureSpec, InputTable, arrays_sha256, canonical_json, plan_shards
from cache.inputs import failures_from_jsonl, failures_to_jsonl
from tests.test_cache.toy import make_inputs, make_spec

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text("aé犬"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc"), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text("abcde"), JSON))
def test_canonical_json_does_not_depend_on_the_order_of_keys(value):
    assert canonical_json(value) == canonical_json(dict(reversed(value.items())))


@pytest.mark.parametrize("value", [float("nan"), {"a": object()}, "\ud800", {1, 2}])
def test_what_is_not_json_is_refused(value):
    with pytest.raises(CacheInvalidError, match="JSON"):
        canonical_json(value)


def test_arrays_sha256_sees_name_dtype_shape_and_values_but_not_memory_order():
    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    digest = arrays_sha256({"a": array, "b": array})
    assert digest == arrays_sha256({"b": np.asfortranarray(array), "a": array.astype(">i4")})
    others = [{"a": array}, {"a": array, "c": array}, {"a": array, "b": array.reshape(3, 2)}]
    others += [{"a": array, "b": array.astype(np.int64)}, {"a": array, "b": array + 1}]
    assert len({digest, *map(arrays_sha256, others)}) == 6


def test_spec_survives_json_and_names_the_first_difference():
    spec = make_spec()
    again = FeatureSpec.from_dict(spec.to_dict())
    assert again == spec
    assert again.fingerprint == spec.fingerprint
    assert spec.first_difference(again) is None
    assert spec.first_difference(make_spec(image_size=518)) == "image_size: 28 in the cache, 518 asked"
    other = make_spec(transform={"mean": (0.5, 0.4, 0.5), "interpolation": "bicubic"})
    assert spec.first_difference(other) == "transform.mean: [0.5,0.5,0.5] in the cache, [0.5,0.4,0.5] asked"


def test_every_field_of_a_spec_changes_its_fingerprint():
    changes = [
        {"backbone": "b"}, {"weights_sha": "b"}, {"transform": {}}, {"image_size": 29}, {"expert_blocks": 2},
        {"patches": "none", "grid": (0, 0)}, {"dtype": "float32"}, {"cls_dim": 7}, {"tap_dim": 5}, {"n_registers": 0},
        {"grid": (3, 2)}, {"compute": {}}, {"semantics": 2},
    ]  # fmt: skip
    assert {key for change in changes for key in change} == set(make_spec().to_dict())
    assert len({make_spec(**change).fingerprint for change in [{}, *changes]}) == len(changes) + 1


def test_taps_are_another_dataset_and_nothing_is_said_of_none():
    two = {"taps": (3, 12), "tap_widths": (6, 6), "tap_tokens": 2}
    stages = {"taps": (1, 2), "tap_widths": (3, 5), "tap_tokens": 1}
    plain, with_taps, of_stages = make_spec(), make_spec(**two), make_spec(**stages)
    assert with_taps.datasets() == plain.datasets() | {"taps": ((2, 2, 6), np.dtype("<f2"))}
    assert of_stages.datasets()["taps"] == ((2, 5), np.dtype("<f2"))  # as wide as the widest
    assert FeatureSpec.from_dict(with_taps.to_dict()) == with_taps
    assert not {"taps", "tap_widths", "tap_tokens"} & plain.to_dict().keys()
    assert plain.fingerprint[:16] == "baad6228c1ade359"  # as before there were taps
    assert with_taps.without_taps() == plain
    assert len({spec.fingerprint for spec in (plain, with_taps, of_stages, make_spec(**two | {"taps": (3, 11)}))}) == 4


@pytest.mark.parametrize(
    "wrong",
    [{"taps": (12, 3)}, {"taps": (3, 3)}, {"taps": (0, 3)}, {"taps": ("3", 4)}, {"tap_widths": (6,)},
     {"tap_widths": (6, 0)}, {"tap_tokens": 0}, {"tap_tokens": 3}, {"taps": (), "tap_widths": ()}],
)  # fmt: skip
def test_taps_that_cannot_be_are_refused(wrong):
    with pytest.raises(CacheInvalidError, match="taps"):
        make_spec(**{"taps": (3, 12), "tap_widths": (6, 6), "tap_tokens": 2} | wrong)


def test_datasets_are_absent_where_there_is_nothing_to_store():
    spec = make_spec(n_registers=0, patches="none", grid=(0, 0), dtype="float32")
    assert spec.datasets() == {"cls": ((6,), np.dtype("<f4")), "tap_cls": ((4,), np.dtype("<f4"))}
    assert spec.row_bytes == 40
    assert make_spec(patches="pool:2", grid=(2, 2)).datasets()["patches"] == ((4, 4), np.dtype("<f2"))


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "bfloat16"}, {"patches": "pool:0"}, {"patches": "half"}, {"patches": "none"}, {"grid": (0, 0)},
        {"patches": "pool:3"}, {"grid": (2, 3, 1)}, {"cls_dim": 0}, {"cls_dim": 2**40}, {"n_registers": -1},
        {"image_size": "28"}, {"expert_blocks": True}, {"transform": "none"}, {"backbone": ""},
        {"compute": {"scale": float("inf")}},
    ],
)  # fmt: skip
def test_impossible_specs_are_refused(change):
    with pytest.raises(CacheInvalidError):
        make_spec(**change)


def test_unknown_and_missing_keys_of_a_spec_are_named():
    body = make_spec().to_dict()
    body["colour"] = body.pop("grid")
    with pytest.raises(CacheInvalidError, match=r"unknown keys \['colour'\], missing keys \['grid'\]"):
        FeatureSpec.from_dict(body)


@given(
    n=st.integers(0, 3000),
    row_bytes=st.integers(1, 5000),
    shard_bytes=st.integers(1, 10**6),
    max_rows=st.integers(1, 500),
    multiple=st.integers(1, 64),
)
def test_plans_cover_all_inputs_once_within_the_bounds(n, row_bytes, shard_bytes, max_rows, multiple):
    plans = plan_shards(n, row_bytes, shard_bytes, max_rows, multiple)
    assert [i for plan in plans for i in range(plan.start, plan.stop)] == list(range(n))
    assert [plan.index for plan in plans] == list(range(len(plans)))
    for plan in plans:
        assert len(plan) <= multiple or (len(plan) * row_bytes <= shard_bytes and len(plan) <= max_rows)
        assert plan.start % multiple == 0


def test_plans_without_sense_are_refused():
    with pytest.raises(CacheInvalidError, match="multiple 0"):
        plan_shards(10, 10, multiple=0)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1), max_size=8))
def test_inputs_survive_parquet_byte_for_byte(ids):
    n, rng = len(ids), np.random.default_rng(0)
    table = InputTable.listing(ids, np.arange(n) - 1, np.arange(n) * 2**40, -np.arange(n))
    table = table.with_results(rng.integers(0, 256, (n, 32)).astype(np.uint8), rng.random(n) < 0.5)
    again = InputTable.from_parquet(table.to_parquet())
    assert again.to_parquet() == table.to_parquet()
    assert again.ids == table.ids
    assert again.columns_sha256() == table.columns_sha256()
    assert again.content_sha256() == table.content_sha256()


def test_content_ignores_times_and_the_listing_ignores_content():
    table = make_inputs()
    moved = InputTable.listing(table.ids, table.labels, table.sizes, table.mtimes_ns + 1)
    assert moved.content_sha256() == table.content_sha256()
    assert moved.columns_sha256() != table.columns_sha256()
    read = table.with_results(table.sha256 + np.uint8(1), table.failed)
    assert read.content_sha256() != table.content_sha256()
    assert read.columns_sha256() == table.columns_sha256()


@pytest.mark.parametrize("bad", ["", "a\0b", "caf\udce9.png"])
def test_ids_that_cannot_be_stored_are_refused(bad):
    with pytest.raises(CacheInvalidError):
        InputTable.listing(["good", bad], [0, 0], [1, 1], [1, 1])


def test_columns_that_do_not_fit_are_refused():
    with pytest.raises(CacheInvalidError, match="labels"):
        InputTable.listing(["a", "b"], [0], [1, 1], [1, 1])


def test_failures_survive_json_lines():
    failures = [Failure("a\n\u2028b.png", 'says "no"'), Failure("犬.png", "")]
    assert failures_from_jsonl(failures_to_jsonl(failures)) == failures
    with pytest.raises(CacheInvalidError):
        failures_from_jsonl(b'{"id": 3}\n')
