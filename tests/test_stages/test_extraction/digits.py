"""Images to extract, some of them broken, and who looks on."""

from pathlib import Path

from cache import FeatureCache
from stages.extract import ExtractOptions, extract_set
from stages.inputs.images import list_images
from stages.networks.backbone import Backbone
from stages.progress import NullProgress

BROKEN = {"0/0000-notes.png": b"no image at all", "1/cut.png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "1/empty.jpg": b""}


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_images(folder: Path) -> Path:
    """37 digits and three files that are no images: two whole batches and a part of one."""
    table = list_images("sklearn:digits[0,1]")
    reader = table.reader()
    for index in [*range(20), *range(len(table) - 17, len(table))]:
        write(folder / table.ids[index], reader.read(index))
    for name, content in BROKEN.items():
        write(folder / name, content)
    return folder


def extract(images, root, backbone, **options) -> FeatureCache:
    spec = options.pop("spec", None) or backbone.feature_spec("float16", "full")
    options = ExtractOptions(**{"max_failures": 1.0} | options)
    return extract_set("digits", list_images(str(images)), spec, root, lambda: backbone, options=options)


def not_needed() -> Backbone:
    raise AssertionError("a backbone is loaded where nothing is to be done")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def intact(images: Path) -> list[str]:
    return [name for name in list_images(str(images)).ids if name not in BROKEN]


class Notes(NullProgress):
    def __init__(self):
        self.lines = []

    def note(self, line):
        self.lines.append(line)


class StopsAfter(Notes):
    def __init__(self, calls: int) -> None:
        super().__init__()
        self.left = calls

    def advance(self, n=1, **fields):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


def counting(backbone, monkeypatch) -> list[int]:
    """Images in each forward pass from now on."""
    sizes, encode = [], backbone.encode
    monkeypatch.setattr(backbone, "encode", lambda images: sizes.append(len(images)) or encode(images))
    return sizes
