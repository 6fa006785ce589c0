"""One sealed cache by itself, without a study: what is in it, and whether it is whole."""

from collections.abc import Mapping

from cache import FeatureCache, FeatureSpec
from pipeline.terminal import Lines, show
from stages.errors import StageError


def verify_cache(cache: FeatureCache, name: str) -> Lines:
    """Compare every byte of a cache with its manifest.

    Args:
        cache: to look at.
        name: how it was given.

    Raises:
        StageError: something is damaged.
    """
    damages = cache.verify()
    show(f"{damage.file}: {damage.what}" for damage in damages)
    show(f"{stray}: not part of the cache, ignored" for stray in cache.strays())
    if damages:
        raise StageError(
            f"{name}: {len(damages)} damaged files; verify --repair with the experiment file makes them again"
        )
    return [f"{name}: whole, {cache.n_rows} rows in {len(cache.manifest.shards)} shards"]


def cache_lines(cache: FeatureCache) -> list[str]:
    """What is in a cache, a line each."""
    manifest, spec = cache.manifest, cache.spec
    n_bytes = sum(shard.nbytes for shard in manifest.shards)
    datasets = ", ".join(f"{name} [n, {', '.join(map(str, shape))}]" for name, (shape, _) in spec.datasets().items())
    return [
        f"cache      {cache.path}",
        f"set        {manifest.dataset}: {manifest.n_rows} rows + {manifest.n_failures} failures "
        f"= {manifest.n_inputs} inputs, {len(manifest.class_names)} classes",
        f"features   {_network_line(spec)}",
        f"datasets   {datasets} as {spec.dtype}",
        *([f"taps       after {_listed(spec)}"] if spec.taps else []),
        f"shards     {len(manifest.shards)}, {n_bytes / 2**20:.1f} MiB",
        *_left_out_lines(manifest.left_out),
        f"identity   fingerprint {cache.fingerprint[:8]}, with its inputs {cache.identity[:8]}",
        *([] if spec.origin else [f"origin     {cache.fingerprint}"]),
    ]


def _listed(spec: FeatureSpec) -> str:
    of = "class token and mean patch" if spec.tap_tokens == 2 else "the mean"
    return f"blocks or stages {', '.join(map(str, spec.taps))}: {of}"


def _network_line(spec: FeatureSpec) -> str:
    network = f"{spec.backbone} at {spec.image_size} px, weights {spec.weights_sha[:8]}" if spec.backbone else ""
    decoded = f"JPEG decoded by {spec.transform['decode']!r}" if "decode" in spec.transform else ""
    return ", ".join(filter(None, (f"given, {spec.origin}" if spec.origin else "", network, decoded)))


def _left_out_lines(left_out: Mapping[str, int]) -> list[str]:
    if not left_out:
        return []
    from stages.inputs.images import describe_left_out  # and all that reads images

    return [describe_left_out(left_out)]
