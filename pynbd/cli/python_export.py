"""``FILE.py:NAME``: a `Disk` out of a file of Python.

NAME is a subclass of `Disk`, one of its objects, or a function without arguments, ``async`` or not,
that returns one. The file may import its neighbours, as a script may. What goes wrong in it is one
line that says where; with --verbose the traceback comes first.
"""

from __future__ import annotations

import inspect
import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from pynbd.errors import PynbdError, UsageError
from pynbd.server.disk import Disk, DiskNode

log = logging.getLogger("pynbd")


async def open_python_export(where: str, *, read_only: bool) -> DiskNode:
    """The disk that ``where`` names, as a node. Raises `UsageError` unless it is FILE.py:NAME,
    `PynbdError` for whatever is wrong with the file.
    """
    file, _, name = where.rpartition(":")
    if not file or not name.isidentifier():
        raise UsageError(f"--python: FILE.py:NAME is expected, not {where!r}")
    module = _load(file)
    found = getattr(module, name, None)
    if found is None:
        raise PynbdError(f"{file}: no {name!r}; {_exports(module)}")
    with _told(file):
        if not isinstance(found, Disk) and callable(found):
            found = found()
            if inspect.isawaitable(found):
                found = await found
    if not isinstance(found, Disk):
        raise PynbdError(f"{where}: {type(found).__name__}, where a pynbd.Disk is expected")
    try:
        with _told(file):
            return DiskNode(found, read_only=read_only)
    except UsageError as error:
        raise PynbdError(f"{file}: {error}") from None


def _load(file: str) -> ModuleType:
    path = Path(file)
    try:
        source = path.read_bytes()
    except OSError as error:
        raise PynbdError(f"{file}: {error.strerror}") from None
    # Under a name that hides no module which the file may want to import.
    module = ModuleType(f"pynbd_export_{path.stem}")
    module.__file__ = file
    sys.modules[module.__name__] = module  # dataclasses, for one, look for it
    sys.path.insert(0, str(path.resolve().parent))
    with _told(file):
        exec(compile(source, file, "exec"), vars(module))
    return module


@contextmanager
def _told(file: str) -> Iterator[None]:
    """Whatever the user's file raises becomes a `PynbdError` of one line."""
    try:
        yield
    except PynbdError:
        raise
    except SyntaxError as error:
        # Of bytes that are no text at all, some versions of Python know no file and no line.
        where = f"{error.filename or file}{f':{error.lineno}' if error.lineno else ''}"
        raise PynbdError(f"{where}: SyntaxError: {error.msg}") from None
    except (Exception, SystemExit) as error:
        log.info("%s", "".join(traceback.format_exception(error)).rstrip())
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == file]
        where = f"{file}:{lines[-1]}" if lines else file
        text = " ".join(str(error).split())
        raise PynbdError(f"{where}: {type(error).__name__}{text and ': '}{text}") from None


def _exports(module: ModuleType) -> str:
    names = [
        repr(name)
        for name, value in vars(module).items()
        if isinstance(value, Disk)
        or (inspect.isclass(value) and issubclass(value, Disk) and not inspect.isabstract(value))
    ]
    return "there is " + (", ".join(names) or "no disk in it")
