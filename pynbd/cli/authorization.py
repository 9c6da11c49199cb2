"""Whether the distinguished name of a certificate is one that may come in, as QEMU's ``authz-*``
objects decide it: the first rule that fits counts, and where none does, the policy.

A rule is an exact name, or a pattern in which ``*`` stands for any run of characters and ``?`` for
one (GLib's, which has no brackets).
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pynbd.errors import PynbdError, UsageError

Authorizer = Callable[[str], bool]

log = logging.getLogger("pynbd")


class Rule:
    """``allows`` whoever it fits, or keeps him out."""

    def __init__(self, match: str, allows: bool, is_glob: bool) -> None:
        self.allows = allows
        self._fits = _glob(match) if is_glob else match.__eq__

    def fits(self, name: str) -> bool:
        return bool(self._fits(name))


@dataclass(frozen=True, slots=True)
class Policy:
    """Rules in their order; ``otherwise``: whether who fits none may come in."""

    rules: Sequence[Rule]
    otherwise: bool

    def allows(self, name: str) -> bool:
        return next((rule.allows for rule in self.rules if rule.fits(name)), self.otherwise)


class ListFile:
    """The policy in a file, with ``refresh`` read again when that has changed. A file that cannot
    be read any more lets nobody in.

    ``read`` makes a policy of its text. Raises `PynbdError` and `OSError`.
    """

    def __init__(self, path: str, read: Callable[[str], Policy], refresh: bool) -> None:
        self._path = path
        self._read = read
        self._refresh = refresh
        self._seen = self._state()
        self._policy = self._load()

    def allows(self, name: str) -> bool:
        if self._refresh:
            try:
                self._renew()
            except (OSError, PynbdError) as error:
                log.error("%s: nobody is let in: %s", self._path, error)
                return False
        return self._policy.allows(name)

    def _renew(self) -> None:
        state = self._state()
        if state != self._seen:
            self._policy = self._load()
            self._seen = state

    def _state(self) -> tuple[int, ...]:
        status = os.stat(self._path)
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

    def _load(self) -> Policy:
        try:
            text = Path(self._path).read_bytes().decode()
        except UnicodeDecodeError:
            raise UsageError(f"{self._path}: not in UTF-8") from None
        return self._read(text)


def _glob(pattern: str) -> Callable[[str], object]:
    """Every run but the last is as short as can be, and stays so: no name makes it take long."""
    first, *others = (re.escape(piece).replace(r"\?", ".") for piece in pattern.split("*"))
    middle = "".join(f"(?>.*?{piece})" for piece in others[:-1])
    last = f".*{others[-1]}" if others else ""
    return re.compile(first + middle + last, re.DOTALL).fullmatch
