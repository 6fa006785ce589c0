"""Small images, tars of them, and what a listing has of each."""

import io
import tarfile

from PIL import Image

from stages.inputs.images import ImageError


def png(gray=0):
    out = io.BytesIO()
    Image.new("L", (4, 3), gray).save(out, "PNG")
    return out.getvalue()


def write_tar(path, files, mode="w"):
    """Tar of {name: bytes, or the name of an earlier member as a hard link}, as tarfile writes it."""
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            if isinstance(data, str):
                member.type, member.linkname = tarfile.LNKTYPE, data
                tar.addfile(member)
            else:
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return str(path)


def write_folder(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def contents(table):
    """Bytes, or why there are none, of every image by its id."""
    reader, found = table.reader(), {}
    for i, name in enumerate(table.ids):
        try:
            found[name] = reader.read(i)
        except ImageError as error:
            found[name] = str(error)
    return found


def classes(table):
    return {
        i: table.class_names[label] if label >= 0 else None for i, label in zip(table.ids, table.labels, strict=True)
    }
