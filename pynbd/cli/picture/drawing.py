"""``pynbd map --image``: a picture of a disk, as SVG or PNG.

`columns` measures, `layout` says what lies where, `svg` and `png`
draw it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from pynbd.cli.picture.columns import DiskPicture, picture_of
from pynbd.cli.picture.layout import lay_out
from pynbd.cli.picture.shapes import Sheet
from pynbd.cli.picture.svg import svg
from pynbd.errors import PynbdError, UsageError

__all__ = ["DiskPicture", "draw", "picture_of", "renderer"]


def draw(picture: DiskPicture, path: Path) -> None:
    """Write a picture into a file, which is replaced; `renderer` says in which format.

    ``OSError`` if it cannot be written.
    """
    data = renderer(path)(lay_out(picture))
    path.write_bytes(data)


def renderer(path: Path) -> Callable[[Sheet], bytes]:
    """What makes the file of a sheet, by the suffix of its name; to be asked before a disk is
    looked over in vain.

    Raises `UsageError` for a suffix that is neither .svg nor .png, `PynbdError` if Pillow is
    needed and missing.
    """
    match path.suffix.lower():
        case ".svg":
            return svg
        case ".png":
            try:
                # By its name: Pillow may be missing, and takes long to import.
                render: Callable[[Sheet], bytes] = import_module("pynbd.cli.picture.png").png
            except ModuleNotFoundError:
                raise PynbdError(
                    f"{path}: drawing PNG needs Pillow: pip install 'pynbd[picture]', or draw .svg"
                ) from None
            return render
        case _:
            raise UsageError(f"--image: {path}: the name has to end in .svg or .png")
