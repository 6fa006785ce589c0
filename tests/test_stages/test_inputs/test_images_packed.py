"""Compressed tars and archives: refused with a command that makes of them what is read."""

import re
import shutil
import subprocess
import tarfile
import zipfile

import pytest

from stages.errors import InputError
from stages.inputs.images import list_images
from tests.test_stages.tars import contents, png, write_tar

FILES = {"cat/1.png": png(1), "dog/2.png": png(2)}
PROGRAMS = {".tar.gz": "gzip", ".tgz": "gzip", ".tar.bz2": "bzip2", ".tar.xz": "xz", ".TAR.GZ": "gzip"}
PROGRAMS |= {".tar.zst": "zstd", ".tar.lzma": "xz --format=lzma", ".tar": "gzip"}


def command_of(source):
    """The command that the refusal names."""
    with pytest.raises(InputError) as caught:
        list_images(str(source))
    message = str(caught.value)
    assert "\n" not in message
    return re.search("`(.*)` unpacks it", message)[1]


def compress(path, program):
    """Compress a tar of FILES into a file."""
    if shutil.which(program.split()[0]) is None:
        pytest.skip(f"{program} is not installed")
    tar = write_tar(path.parent / "whole", FILES)
    with open(path, "wb") as out:
        subprocess.run([*program.split(), "-c", tar], stdout=out, check=True)


@pytest.mark.parametrize("suffix", PROGRAMS)
def test_the_command_unpacks_what_is_then_read(tmp_path, suffix):
    path = tmp_path / f"my set{suffix}"
    compress(path, PROGRAMS[suffix])
    before = path.read_bytes()
    subprocess.run(command_of(path), shell=True, check=True, cwd="/")
    assert path.read_bytes() == before
    (unpacked,) = set(tmp_path.iterdir()) - {path, tmp_path / "whole"}
    assert contents(list_images(str(unpacked))) == FILES


def test_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "my set.zip", "w") as archive:
        for name, data in FILES.items():
            archive.writestr(name, data)
    command = command_of(tmp_path / "my set.zip")
    assert command_of(tmp_path) == command  # a folder with nothing else
    assert command.startswith("python -m zipfile -e ")
    zipfile.main(["-e", str(tmp_path / "my set.zip"), str(tmp_path / "my set")])
    assert contents(list_images(str(tmp_path / "my set"))) == FILES


def test_compressed_shards_are_refused_until_they_are_unpacked(tmp_path):
    write_tar(tmp_path / "0.tar", FILES)
    compress(tmp_path / "1.tar.gz", "gzip")
    (tmp_path / "whole").unlink()
    for source in (tmp_path, tmp_path / "*", tmp_path / "{0.tar,1.tar.gz}"):
        command = command_of(source)
    subprocess.run(command, shell=True, check=True)
    for source in (tmp_path, tmp_path / "*"):
        table = list_images(str(source))
        assert table.ids == ("0.tar/cat/1.png", "0.tar/dog/2.png", "1.tar/cat/1.png", "1.tar/dog/2.png")
        assert table.left_out == {".gz": 1}


def test_what_is_only_called_compressed_is_refused(tmp_path):
    with tarfile.open(tmp_path / "0.tar.gz", "w"):
        pass
    with pytest.raises(InputError, match=r"0\.tar\.gz: not compressed"):
        list_images(str(tmp_path))
    with pytest.raises(InputError, match="not a source of images"):
        list_images(str(tmp_path / "0.tar.gz"))


@pytest.mark.parametrize("name", ["rows.npz", "rows.pt", "rows.pth"])
def test_files_of_arrays_are_no_archives_to_unpack(tmp_path, name):
    """Though their bytes are those of a zip archive."""
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("cls.npy", b"")
    with pytest.raises(InputError, match=f"{name}: not a source of images; give a folder"):
        list_images(str(tmp_path / name))
