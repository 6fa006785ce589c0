"""Files, and not pipes or devices, which a reader may wait for without end."""

import errno
import os
import stat
import tempfile


def check_regular(path: str | os.PathLike[str]) -> None:
    """Refuse what has no end; a folder is left to whoever opens it.

    Raises:
        OSError: there is nothing, or a pipe, a socket or a device.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))


def check_takes_files(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder in which no file can be made, whatever its permissions say; nothing is left in it.

    Raises:
        OSError: why.
    """
    tempfile.TemporaryFile(dir=folder).close()


def check_file_to_write(path: str | os.PathLike[str]) -> None:
    """Refuse what no file can be written to, before the work whose result is to stand there.

    Raises:
        OSError: a folder, a pipe or a device stands there, or the folder that it is to be in is not there or takes no
            file.
    """
    if os.path.isdir(path):
        raise OSError(errno.EISDIR, "a folder, a file is needed", os.fspath(path))
    if os.path.exists(path):
        check_regular(path)
    check_takes_files(os.path.dirname(os.path.abspath(path)))
