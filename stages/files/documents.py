"""Text and JSON that stages leave for each other, and documents: JSON that proves itself and what it is about.

A *document* is JSON that begins with the digest of its own bytes, and says under ``files`` what bytes the files have
that it is about. So whatever is derived from a file can be named by the bytes that it was derived from, and a changed
byte of one or the other is found.
"""

import json
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cache.files import is_whole, seal, write_file
from cache.fingerprint import file_sha256

CONTENTS = "contents.json"


def write_json(path: Path, value: Any) -> None:
    """Write indented UTF-8 JSON, making its folder."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, text.encode("utf-8"))


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None where there is no such file or it is no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def write_document(path: Path, body: Mapping[str, Any]) -> None:
    """Write an indented JSON object that begins with the digest of its bytes, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(body, indent=2, ensure_ascii=False).removeprefix("{").removeprefix("\n") + "\n"
    write_file(path, seal(text.encode("utf-8")))


def read_document(path: Path) -> dict[str, Any] | None:
    """Read what `write_document` wrote; None where there is no such file or a byte of it is another."""
    try:
        data = path.read_bytes()
        body = json.loads(data) if is_whole(data) else None
    except (OSError, ValueError, RecursionError):
        return None
    if body is not None:
        del body["digest"]
    return body


def read_made_of(path: Path, identity: str, unread: Container[str] = ()) -> dict[str, Any] | None:
    """Read a document of what is fresh: it says this identity, and it and its files are as they were left.

    Args:
        path: of the document; its ``files`` stand in the same folder or below.
        identity: digest of all that its files would be made of now.
        unread: of these it is enough that they are there.

    Returns:
        None where anything is missing, has other bytes, or is made of something else.
    """
    about = read_document(path)
    if about is None or about.get("identity") != identity or any(changed_files(path, about, unread)):
        return None
    return about


def changed_files(
    path: Path, about: Mapping[str, Any], unread: Container[str] = ()
) -> Iterator[tuple[Path, str | None]]:
    """Files that are not as a document says: each with the SHA-256 that it has, None where it is missing.

    Args:
        path: of the document.
        about: what it says.
        unread: as in `read_made_of`.
    """
    for name, digest in about.get("files", {}).items():
        file = path.parent / name
        found = digest if name in unread and file.is_file() else digest_of(file)
        if found != digest:
            yield file, found


def write_contents(folder: Path, identity: str, names: Iterable[str]) -> None:
    """Write ``contents.json``: what a folder's files are made of, and what bytes they have."""
    files = {name: digest_of(folder / name) for name in sorted(names)}
    write_document(folder / CONTENTS, {"identity": identity, "files": files})


def has_contents(folder: Path, identity: str) -> bool:
    """Whether a folder's files are all there, as they were left, and made of this."""
    return read_made_of(folder / CONTENTS, identity) is not None


def find_damages(documents: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    """What is wrong with documents and with the files that they are about: path and what."""
    for path in documents:
        about = read_document(path)
        if about is None:
            yield path, "its bytes are not those that were written"
        for file, found in changed_files(path, about or {}):
            yield file, "is missing" if found is None else "its bytes are not those that were written"


def digest_of(path: Path) -> str | None:
    """SHA-256 of a file's bytes; None where it cannot be read."""
    try:
        return file_sha256(path)
    except OSError:
        return None
