"""Which files may be opened for an image from a stranger.

What such an image says of other files must lead to nothing but files that were put beside it:

1. All files are regular ones in the directory of the image, or below that.
2. That directory is where the image really is, symbolic links resolved; and so is each other file
   judged: by what it is, not by its name, which may lead elsewhere a moment later.
3. No file is opened before it is known to be one that may be. It is looked up first (O_PATH),
   which does nothing to it, nor waits for it; then that very file is opened.
4. A name that leads out of the directory by what is written in it is not looked up at all: that
   alone may mount a file system, or wait for another host.

Who can change names in that directory can also put files there: he is trusted, or it is no
directory for this.
"""

from __future__ import annotations

import os
import stat

from pynbd.errors import ImageError

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
)


class Confinement:
    """The files of one chain. The first that is opened is the image, and says where the others
    may be.
    """

    def __init__(self) -> None:
        self._directory = ""  # where the image really is
        self._named = ""  # and by its name

    def check_name(self, path: str) -> None:
        """Rule 4. Raises `ImageError`."""
        absolute = os.path.abspath(path)
        if self._directory and not (
            _is_below(self._named, absolute) or _is_below(self._directory, absolute)
        ):
            raise self._outside(path)

    def open(self, path: str, flags: int) -> int:
        """Open a file that may be opened, as ``os.open`` does. Raises `ImageError` for others."""
        self.check_name(path)
        found = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            mode = os.fstat(found).st_mode
            if not stat.S_ISREG(mode):
                kind = next((kind for is_one, kind in _KINDS if is_one(mode)), "no file")
                raise ImageError(
                    f"{path}: it is {kind}; an untrusted image has regular files alone"
                )
            link = f"/proc/self/fd/{found}"
            really = os.readlink(link)
            if not self._directory:
                self._directory = os.path.dirname(really)
                self._named = os.path.dirname(os.path.abspath(path))
            elif not _is_below(self._directory, really):
                raise self._outside(path)
            return os.open(link, flags)
        finally:
            os.close(found)

    def _outside(self, path: str) -> ImageError:
        return ImageError(
            f"{path}: it is outside of {self._directory}, the directory of the image; an untrusted"
            " one has its files in there alone"
        )


def _is_below(directory: str, path: str) -> bool:
    return path.startswith(f"{directory.rstrip('/')}/")
