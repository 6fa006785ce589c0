"""Datasets from Python: whatever an item is, its bytes; whatever its labels are, their classes."""

import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, TensorDataset
from torchvision.datasets import FakeData, ImageFolder
from torchvision.transforms import ToTensor

from stages.errors import InputError
from stages.extract import ExtractOptions, extract_set
from stages.inputs.images import ImageError, decode_image, list_dataset, list_images

RAMP = np.arange(0, 240, 4, np.uint8).reshape(4, 5, 3)


class Items(Dataset):
    """Items as given; an exception is raised where one stands."""

    def __init__(self, items, **attributes):
        self.items = items
        vars(self).update(attributes)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        if isinstance(self.items[index], Exception):
            raise self.items[index]
        return self.items[index]


class Stream(IterableDataset):
    def __iter__(self):
        yield RAMP


def file_bytes(image, form="PNG", **options):
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def classes(table):
    return [table.class_names[label] if label >= 0 else None for label in table.labels]


def pixels(item):
    """Pixels [h, w, 3] that the network would see of an item."""
    return np.asarray(decode_image(list_dataset(Items([item]), "mine").reader().read(0)))


def reason(item):
    reader = list_dataset(Items([item]), "mine").reader()
    with pytest.raises(ImageError) as caught:
        reader.read(0)
    return str(caught.value)


def test_torchvisions_image_folder_gives_the_pixels_and_classes_of_the_folder(tmp_path):
    for name, gray in {"dog/1.png": 10, "cat/1.png": 20, "cat/2.png": 30}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (4, 3), gray).save(tmp_path / name)
    mine, listed = list_dataset(ImageFolder(tmp_path), "mine"), list_images(str(tmp_path))
    assert mine.ids == ("00000000", "00000001", "00000002")
    assert mine.class_names == listed.class_names == ("cat", "dog")
    assert mine.labels.tolist() == listed.labels.tolist() == [0, 0, 1]
    for i in range(3):
        assert np.array_equal(decode_image(mine.reader().read(i)), decode_image(listed.reader().read(i)))
    assert mine.sizes.tolist() == [-1, -1, -1]  # unknown: nothing was read
    assert mine.mtimes_ns.tolist() == [0, 0, 0]


def test_bytes_and_paths_are_read_as_they_are(tmp_path):
    data = file_bytes(Image.fromarray(RAMP), "JPEG")
    (tmp_path / "a.jpg").write_bytes(data)
    table = list_dataset(Items([data, bytearray(data), str(tmp_path / "a.jpg"), tmp_path / "a.jpg"]), "mine")
    assert [table.reader().read(i) for i in range(4)] == [data] * 4


@pytest.mark.parametrize(
    "item",
    [
        Image.fromarray(RAMP),
        RAMP,
        torch.from_numpy(RAMP),
        torch.from_numpy(RAMP).permute(2, 0, 1),
        (RAMP, 3),
        [torch.from_numpy(RAMP), torch.tensor(3)],
    ],
)
def test_pixels_arrive_as_they_are(item):
    assert np.array_equal(pixels(item), RAMP)


@pytest.mark.parametrize("gray", [RAMP[..., 0], RAMP[..., :1], torch.from_numpy(RAMP[..., 0])[None]])
def test_gray_pixels(gray):
    assert np.array_equal(pixels(gray), np.repeat(RAMP[..., :1], 3, axis=2))


def test_pil_images_are_seen_as_their_files_are():
    """Transparency, palettes, 16 bits and EXIF orientation: one rule for both ways in."""
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = Image.fromarray(np.kron(RAMP, np.ones((4, 4, 1), np.uint8)))
    clear = photo.convert("RGBA")
    clear.putalpha(100)
    files = [
        file_bytes(clear),
        file_bytes(photo.convert("LA")),
        file_bytes(photo.quantize(8), transparency=2),
        file_bytes(Image.fromarray(np.arange(0, 60000, 3000, np.uint16).reshape(4, 5))),
        file_bytes(photo.convert("CMYK"), "JPEG"),
        file_bytes(photo, "JPEG", exif=exif),
        file_bytes(photo, "GIF", save_all=True, append_images=[photo.rotate(90)]),
    ]
    for data in files:
        with Image.open(io.BytesIO(data)) as image:
            assert np.array_equal(pixels(image), np.asarray(decode_image(data)))
    assert pixels(Image.open(io.BytesIO(files[5]))).shape == (20, 16, 3)


def test_reasons():
    image = Image.fromarray(RAMP)
    assert reason(ToTensor()(image)) == "already transformed: give a dataset without transform"
    assert reason(np.zeros((4, 4, 3))) == "already transformed: give a dataset without transform"
    two_ways = "a tensor of shape [3, 4, 3] may be read in two ways: give a NumPy array [h, w, 3]"
    assert reason(torch.zeros(3, 4, 3, dtype=torch.uint8)) == two_ways
    assert reason(torch.zeros(3, 4, 4, dtype=torch.bfloat16)) == "already transformed: give a dataset without transform"
    assert reason(np.zeros((4, 4), np.uint16)).startswith("pixels of type uint16 and shape [4, 4]; uint8 [h, w] or")
    assert reason(torch.zeros(2, 4, 4, dtype=torch.uint8)).startswith("pixels of type uint8 and shape [2, 4, 4]")
    assert reason({"image": image}) == "a dict, not an image; an item must be or begin with one"
    assert reason(()) == "a tuple, not an image; an item must be or begin with one"
    assert reason(None) == "a NoneType, not an image; an item must be or begin with one"
    assert reason("gone.png") == "cannot be read: No such file or directory"
    assert reason(ValueError("odd\nrow")) == "the dataset cannot give it: ValueError: odd row"
    assert reason(KeyError()) == "the dataset cannot give it: KeyError: KeyError"
    assert reason(ImageError("blurred")) == "blurred"
    assert reason(Image.open(io.BytesIO(file_bytes(Image.new("RGB", (99, 99)), "JPEG")[:-60]))).startswith("truncated")


def test_a_huge_pil_image_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # Pillow's own check, which its users may switch off
    with Image.open(io.BytesIO(b"P5\n13378 13378\n255\n")) as image:  # just over the limit, and no pixels at all
        assert reason(image) == "too large: more than 178956970 pixels"


def test_labels_may_be_whole_numbers_of_any_type():
    labels = [7.0, np.float32(7), torch.tensor(7.0), np.uint8(7), "7", "07", float("nan"), np.str_("-1")]
    assert classes(list_dataset(Items([RAMP] * 8), "mine", labels)) == ["7"] * 6 + [None, None]


def test_labels_are_given_or_targets_or_second_entries():
    items = [(RAMP, 5), (RAMP, torch.tensor(10)), (RAMP, np.int64(5)), (RAMP, None), ValueError("gone")]
    assert classes(list_dataset(Items(items), "mine")) == ["5", "10", "5", None, None]
    assert list_dataset(Items(items), "mine").class_names == ("5", "10")
    with_targets = Items(items, targets=torch.tensor([1, 0, 0, -1, 1]), classes=["cat", "dog"])
    assert classes(list_dataset(with_targets, "mine")) == ["dog", "cat", "cat", None, "dog"]
    assert classes(list_dataset(with_targets, "mine", class_names=["a", "b"])) == ["b", "a", "a", None, "b"]
    given = list_dataset(with_targets, "mine", labels=["owl", None, "", "eel", "owl"])
    assert classes(given) == ["owl", None, None, "eel", "owl"]
    assert classes(list_dataset(Items([RAMP, RAMP]), "mine")) == [None, None]
    assert classes(list_dataset(TensorDataset(torch.zeros(2, 3, 4, 4, dtype=torch.uint8)), "mine")) == [None, None]


def test_synonyms_make_one_name():
    table = list_dataset(Items([RAMP], targets=[1], classes=[("tench", "Tinca tinca"), ("crane", "bird")]), "mine")
    assert table.class_names == ("crane, bird",)


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (Items([]), {}, "mine: the dataset has no items"),
        (Stream(), {}, "mine: the dataset has no length; give a map-style dataset"),
        (Items([RAMP]), {"labels": [1, 2]}, "mine: 2 labels for 1 items"),
        (Items([RAMP], targets=[{"box": 1}]), {}, "mine: the label of item 0 is a dict, must be a whole number"),
        (Items([RAMP], targets=torch.zeros(1, 40)), {}, "the label of item 0 is a Tensor, must be a whole number"),
        (Items([(RAMP, 1.5)]), {}, "the label of item 0 is a float"),
        (Items([(RAMP, torch.ones(2))]), {}, "the label of item 0 is a Tensor"),
        (Items([(RAMP, -2)]), {}, "item 0 is of class -2, must be -1 or"),
        (Items([(RAMP, 2)], classes=["a", "b"]), {}, "item 0 is of class 2, must be -1 or"),
        (Items([(RAMP, 0)], classes=[("crane",), ("crane",)]), {}, "classes 0 and 1 are both called 'crane'"),
    ],
)
def test_datasets_that_do_not_fit_are_refused(dataset, options, message):
    with pytest.raises(InputError, match=message):
        list_dataset(dataset, "mine", **options)


class OpenFile(Items):
    """Reads through one open file, as many datasets do: two threads at once would get each other's bytes."""

    def __init__(self, path, size, count):
        super().__init__([None] * count)
        self.path, self.size, self.file = path, size, None

    def __getitem__(self, index):
        if self.file is None:
            self.file = Path(self.path).open("rb")  # noqa: SIM115
        self.file.seek(index * self.size)
        return b"".join(self.file.read(1) for _ in range(self.size)), 0


def test_threads_take_turns(tmp_path):
    contents = [bytes([i]) * 500 for i in range(200)]
    (tmp_path / "all").write_bytes(b"".join(contents))
    dataset = OpenFile(tmp_path / "all", 500, 200)
    reader = list_dataset(dataset, "mine", labels=[0] * 200).reader()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(reader.read, range(200))) == contents
    dataset.file.close()


def test_extraction_reads_it_and_other_processes_could(tmp_path, backbone):
    items = list(FakeData(6, (3, 32, 32), 3))  # PIL images with labels
    items[2] = ValueError("row 2 is lost")
    table = list_dataset(Items(items), "mine")
    copy = pickle.loads(pickle.dumps(table.reader(3, 6)))
    assert [copy.read(i) for i in range(3)] == [table.reader().read(i) for i in range(3, 6)]

    spec = backbone.feature_spec("float16", "none")
    cache = extract_set("mine", table, spec, tmp_path, lambda: backbone, options=ExtractOptions(max_failures=0.5))

    assert cache.n_rows == 5
    assert "ValueError: row 2 is lost" in (cache.path / "failures.jsonl").read_text()
