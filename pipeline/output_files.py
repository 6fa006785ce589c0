"""Files that a command is to write, refused before its work where they cannot be."""

from pathlib import Path
from typing import Any

import click

from stages.files.regular import check_file_to_write


class OutputFile(click.Path):
    """A path to write to: in a folder that is there and takes files, and no folder, pipe or device itself."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path, or a refusal."""
        path = Path(str(super().convert(value, param, ctx)))
        if str(value).endswith("/"):
            self.fail(f"{value} is meant as a folder; give a file", param, ctx)
        try:
            check_file_to_write(path)
        except OSError as error:
            why = error.strerror or error
            self.fail(f"{path} cannot be written to: {why}; give a file in a folder that is there", param, ctx)
        return path
