"""Where caches stand under their root."""

import pytest

from cache import CacheInvalidError, find_caches, next_cache_path
from tests.test_cache.toy import begin, fill, make_spec


def test_caches_are_found_by_set_and_fingerprint(tmp_path):
    spec, other = make_spec(), make_spec(semantics=2)
    first = next_cache_path(tmp_path, "pets", spec)
    assert first.name == f"pets-{spec.fingerprint:.8}"
    assert find_caches(tmp_path / "nowhere", "pets", spec) == []
    first.mkdir()  # a process killed between making the folder and its plan
    assert find_caches(tmp_path, "pets", spec) == []
    assert next_cache_path(tmp_path, "pets", spec) == first
    fill(first)
    paths = [first]
    for _ in range(10):
        paths.append(next_cache_path(tmp_path, "pets", spec))
        begin(paths[-1]).close()
    assert paths[1].name.endswith("-2")
    assert find_caches(tmp_path, "pets", spec) == paths
    assert find_caches(tmp_path, "pets", other) == find_caches(tmp_path, "pet", spec) == []
    with pytest.raises(CacheInvalidError, match=r"set name '\.\./pets'"):
        next_cache_path(tmp_path, "../pets", spec)
