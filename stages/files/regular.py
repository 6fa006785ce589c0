"""Files, and not pipes or devices, which a reader may wait for without end."""

import errno
import os
import stat


def check_regular(path: str | os.PathLike[str]) -> None:
    """Refuse what has no end; a folder is left to whoever opens it.

    Raises:
        OSError: there is nothing, or a pipe, a socket or a device.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
