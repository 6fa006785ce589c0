"""Exact neighbours: against brute force in float64. Blocks and approximate ones: against exact ones."""

import tracemalloc

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.errors import InputError
from stages.scorers.neighbours.bank import FeatureBank
from stages.scorers.shared.arrays import l2_normalise


def brute_force(bank, queries):
    """All distances between unit vectors, float64, ascending: [n, rows]."""
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (np.float64(bank), np.float64(queries))]
    return np.sort(np.linalg.norm(unit[1][:, None] - unit[0][None], axis=2), axis=1)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, int])
def test_normalised_rows_have_length_one_and_a_zero_row_stays_zero(dtype):
    rows = np.array([[3, -4, 0], [0, 0, 0], [200, 200, 100]], dtype=dtype)  # 200² overflows float16
    unit = l2_normalise(rows)
    assert unit.dtype == np.float32
    np.testing.assert_allclose(unit, [[0.6, -0.8, 0], [0, 0, 0], [2 / 3, 2 / 3, 1 / 3]], rtol=1e-6)


def test_normalising_neither_overflows_nor_vanishes():
    np.testing.assert_allclose(l2_normalise(np.float32([[3e38, 3e38], [3e-38, 3e-38]])), np.sqrt(0.5), rtol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(1, 40), st.integers(1, 8), st.integers(0, 10**6))
def test_neighbours_are_those_of_brute_force(n_bank, n_queries, dim, seed):
    rng = np.random.default_rng(seed)
    bank, queries = rng.normal(size=(n_bank, dim)), rng.normal(size=(n_queries, dim))
    distances, rows = FeatureBank(bank).search(queries, k=n_bank)
    np.testing.assert_allclose(distances, brute_force(bank, queries), atol=1e-6)
    assert (np.sort(rows, axis=1) == np.arange(n_bank)).all()
    assert (np.diff(distances, axis=1) >= 0).all()
    assert (distances <= 2 + 1e-6).all()  # they point in opposite directions


def test_near_duplicates_are_measured_to_1e_6_too():
    """√(2 − 2·cos) alone would be wrong by up to 4e-4 here."""
    rng = np.random.default_rng(0)
    bank = np.float32(rng.normal(size=(200, 64)))
    queries = np.float32(bank[:150] + rng.normal(size=(150, 64)) * np.logspace(-7, -2, 150)[:, None])
    distances, rows = FeatureBank(bank).search(queries, k=3)
    np.testing.assert_allclose(distances, brute_force(bank, queries)[:, :3], atol=1e-6)
    assert (rows[:, 0] == np.arange(150)).all()
    assert FeatureBank(bank).search(bank, k=1)[0].max() == 0


def test_beside_a_gpu_blocks_of_queries_have_the_neighbours_of_a_flat_search(monkeypatch):
    """faiss's own index on the CPU stands where the GPU's would: what is around it is the same."""
    rng = np.random.default_rng(3)
    bank, queries = rng.normal(size=(300, 24)), rng.normal(size=(5200, 24))
    queries[::7] = bank[rng.integers(0, 300, len(queries[::7]))] + 1e-4
    flat = FeatureBank(bank, device="cpu").search(queries, k=10)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", lambda index: index)
    ours = FeatureBank(bank)
    distances, rows = ours.search(queries, k=10)
    assert ours._built is not None
    assert (rows == flat[1]).all()
    np.testing.assert_allclose(distances, flat[0], atol=1e-6)
    refused = np.where(np.arange(24) == 3, np.nan, queries[:1])
    with pytest.raises(InputError, match="query features hold NaN"):
        ours.search(refused, k=10)


def test_normalising_by_blocks_has_the_same_bits():
    rows = np.random.default_rng(4).normal(size=(130, 1537)).astype(np.float16)
    whole = l2_normalise(rows)
    assert (whole == np.concatenate([l2_normalise(rows[start : start + 37]) for start in range(0, 130, 37)])).all()
    exact = rows / np.sqrt(np.square(rows, dtype=np.float64).sum(1, keepdims=True))
    assert (np.abs(whole - exact) <= np.spacing(np.abs(whole))).all()


def test_neighbours_do_not_depend_on_how_queries_are_batched():
    rng = np.random.default_rng(1)
    bank, queries = FeatureBank(rng.normal(size=(500, 32))), rng.normal(size=(2300, 32))
    distances, rows = bank.search(queries, k=20)
    pieces = [bank.search(part, k=20) for part in np.array_split(queries, [1, 130, 700])]
    np.testing.assert_allclose(np.concatenate([d for d, _ in pieces]), distances, atol=1e-6)
    assert np.mean(np.concatenate([r for _, r in pieces]) == rows) > 0.999
    np.testing.assert_array_equal(bank.search(queries, k=20)[0], distances)  # the same call: the same bits
    np.testing.assert_allclose(bank.search(queries, k=5)[0], distances[:, :5], atol=1e-6)  # other k are lookups


def test_leave_one_out_skips_the_row_itself():
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(40, 6))
    distances, found = FeatureBank(rows).search(rows, k=39, exclude_self=True)
    assert (found != np.arange(40)[:, None]).all()
    np.testing.assert_allclose(distances, brute_force(rows, rows)[:, 1:], atol=1e-6)


def test_leave_one_out_among_duplicates_keeps_k_neighbours():
    rows = np.repeat([[1.0, 0.0], [0.0, 1.0]], 6, axis=0)
    distances, found = FeatureBank(rows).search(rows, k=2, exclude_self=True)
    assert (distances == 0).all()
    assert (found != np.arange(12)[:, None]).all()


def test_a_zero_row_is_a_right_angle_from_everything():
    distances, _ = FeatureBank([[0.0, 0.0], [1.0, 0.0]]).search([[0.0, 0.0], [2.0, 0.0]], k=2)
    np.testing.assert_allclose(distances, [[2**0.5, 2**0.5], [0, 2**0.5]], rtol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (3,)])
def test_an_empty_or_flat_bank_is_refused(shape):
    with pytest.raises(InputError, match=r"bank (of|features have) shape|a bank of shape"):
        FeatureBank(np.ones(shape))


@pytest.mark.parametrize(
    ("queries", "options", "says"),
    [
        (np.ones((2, 3)), {"k": 0}, "k = 0 asked of a bank with 4 rows"),
        (np.ones((2, 3)), {"k": 5}, "give 1 to 4"),
        (np.ones((4, 3)), {"k": 4, "exclude_self": True}, "give 1 to 3"),
        (np.ones((2, 3)), {"k": 1, "exclude_self": True}, "own 4 rows as queries, 2 given"),
        (np.ones((2, 5)), {"k": 1}, "queries have 5 features a row, the bank 3"),
        (np.array([[1, 2, 3], [1, np.nan, 3]]), {"k": 1}, "1 of 2 query features hold NaN or inf, row 1 first"),
    ],
)
def test_impossible_searches_are_refused(queries, options, says):
    bank = FeatureBank(np.eye(4, 3) + 1)
    with pytest.raises(InputError, match=says):
        bank.search(queries, **options)


def test_no_queries_no_neighbours():
    distances, rows = FeatureBank(np.ones((4, 3))).search(np.empty((0, 3)), k=2)
    assert distances.shape == rows.shape == (0, 2)


# ------------------------------------------------------------------------------- banks that are larger than memory


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 90), st.integers(1, 40), st.integers(1, 8), st.integers(1, 30), st.booleans(), st.integers(0, 99))
def test_blocks_equal_one_index(n_bank, n_queries, dim, block, tied, seed):
    rng = np.random.default_rng(seed)
    bank, queries = rng.normal(size=(n_bank, dim)), rng.normal(size=(n_queries, dim))
    if tied:
        bank, queries = bank.round(), queries.round()
    k = int(rng.integers(1, n_bank + 1))
    distances, rows = FeatureBank(bank, held_bytes=0, block_rows=block).search(queries, k)
    plain, _ = FeatureBank(bank).search(queries, k)
    np.testing.assert_allclose(distances, plain, atol=1e-6)
    unit = [np.float64(l2_normalise(array)) for array in (bank, queries)]
    own = np.maximum(0, 2 - 2 * np.einsum("nd,nkd->nk", unit[1], unit[0][rows]))  # squared, of the row named
    np.testing.assert_allclose(own, np.float64(distances) ** 2, atol=1e-6)
    assert all(len(set(found)) == k for found in rows.tolist())


def test_a_bank_is_read_from_its_file_by_blocks(tmp_path):
    rng = np.random.default_rng(3)
    bank, queries = np.float16(rng.normal(size=(20_000, 64))), np.float32(rng.normal(size=(50, 64)))
    np.save(tmp_path / "bank.npy", bank)
    plain, _ = FeatureBank(bank).search(queries, k=20)
    tracemalloc.start()
    stored = np.load(tmp_path / "bank.npy", mmap_mode="r")
    distances, _ = FeatureBank(stored, held_bytes=1 << 20, block_rows=500).search(queries, k=20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_allclose(distances, plain, atol=1e-6)
    assert peak < 1 << 20  # the unit vectors would take 5 MB


def test_leave_one_out_by_blocks():
    rows = np.random.default_rng(2).normal(size=(40, 6))
    distances, found = FeatureBank(rows, held_bytes=0, block_rows=7).search(rows, k=39, exclude_self=True)
    assert (found != np.arange(40)[:, None]).all()
    np.testing.assert_allclose(distances, brute_force(rows, rows)[:, 1:], atol=1e-6)


# ------------------------------------------------------------------------------------------------ approximate search


@pytest.fixture(scope="module")
def clusters():
    """1,500 rows and 200 queries around 40 centres, as features of classes lie."""
    rng = np.random.default_rng(4)
    centres = rng.normal(size=(40, 32))
    return [centres[rng.integers(40, size=n)] + 0.3 * rng.normal(size=(n, 32)) for n in (1500, 200)]


@pytest.mark.parametrize("index", ["ivf", "hnsw"])
def test_an_approximate_index_says_what_it_finds(index, clusters):
    bank, queries = FeatureBank(clusters[0], index=index), clusters[1]
    distances, rows = bank.search(queries, k=10)
    exact, exact_rows = FeatureBank(clusters[0]).search(queries, k=10)
    found = np.mean([len(np.intersect1d(*pair)) for pair in zip(rows, exact_rows, strict=True)]) / 10
    assert bank.recall(queries, k=10) == pytest.approx(found, abs=1e-3)
    assert found > 0.9
    assert (distances >= exact - 1e-6).all()
    np.testing.assert_array_equal(FeatureBank(clusters[0], index=index).search(queries, k=10)[0], distances)


def test_an_index_that_misses_much_says_so():
    rng = np.random.default_rng(5)
    rows, queries = rng.normal(size=(4000, 32)), rng.normal(size=(300, 32))  # without clusters: neighbours lie anywhere
    assert 0.01 < FeatureBank(rows, index="ivf", probes=2).recall(queries, k=10) < 0.5
    assert FeatureBank(rows).recall(queries, k=10) == 1


@pytest.mark.parametrize("index", ["ivf", "hnsw"])
@pytest.mark.parametrize("n", [1, 30, 200])
def test_an_approximate_index_gives_k_neighbours_of_any_bank(index, n, clusters):
    distances, rows = FeatureBank(clusters[0][:n], index=index).search(clusters[1], k=n)
    assert (np.sort(rows, axis=1) == np.arange(n)).all()
    np.testing.assert_allclose(distances, brute_force(clusters[0][:n], clusters[1]), atol=1e-6)


def test_an_approximate_index_needs_its_bank_in_memory():
    with pytest.raises(InputError, match=r"hnsw .* index = flat"):
        FeatureBank(np.ones((4, 3)), index="hnsw", held_bytes=40)


def test_a_bank_is_known_by_what_it_holds_and_how_it_searches():
    rows = np.eye(4, 3) + 1
    digest = FeatureBank(rows).digest
    assert FeatureBank(rows.copy(order="F")).digest == digest
    assert FeatureBank(rows, held_bytes=0).digest == digest
    others = [
        FeatureBank(rows[::-1]),
        FeatureBank(rows[:3]),
        FeatureBank(np.float32(rows)),
        FeatureBank(rows, index="ivf"),
    ]
    assert len({digest, *(other.digest for other in others)}) == 5
