"""The properties of an object of QEMU's, from the command line or from JSON: taken one by one, each
as what it has to be; what nobody takes is an error.
"""

from __future__ import annotations

import json
import re

from pynbd.block.image_options import nested
from pynbd.cli.keyval import parse_keyval
from pynbd.errors import UsageError

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
_WORDS = {"on": True, "yes": True, "true": True, "y": True}
_WORDS |= {"off": False, "no": False, "false": False, "n": False}


class Properties:
    """The properties of an object that nobody has taken yet; ``place`` begins its errors."""

    def __init__(self, kind: str, name: str, values: dict[str, object], place: str) -> None:
        self.kind = kind
        self.id = name
        self.place = place
        self._values = values

    @classmethod
    def parse(cls, text: str) -> Properties:
        if text.startswith("{"):
            values = object_of_json(text, "--object")
        else:
            pairs = dict(parse_keyval(text, "qom-type", "--object"))
            values = nested(pairs, "--object")
        kind, name = values.pop("qom-type", None), values.pop("id", None)
        if not isinstance(kind, str) or not kind:
            raise UsageError("--object: TYPE,id=ID,... is expected")
        place = f"--object {kind}"
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UsageError(
                f"{place}: id: a letter, and letters, digits, '-', '.', '_' are expected"
            )
        return cls(kind, name, values, f"{place},id={name}")

    def take(self, name: str) -> object:
        return self._values.pop(name, None)

    def text(self, name: str) -> str | None:
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            raise UsageError(f"{self.place}: {name}: a text is expected")
        return value

    def needed(self, name: str) -> str:
        value = self.text(name)
        if value is None:
            raise UsageError(f"{self.place}: {name} is missing")
        return value

    def choice(self, name: str, choices: tuple[str, ...], usual: str | None) -> str:
        value = self.take(name)
        if value is None:
            value = usual
        if value not in choices:
            said = "missing" if value is None else repr(value)
            raise UsageError(f"{self.place}: {name}: {said}; there are {', '.join(choices)}")
        return str(value)

    def flag(self, name: str, usual: bool) -> bool:
        value = self.take(name)
        if value is None:
            return usual
        value = _WORDS.get(value) if isinstance(value, str) else value
        if not isinstance(value, bool):
            raise UsageError(f"{self.place}: {name}: on or off is expected")
        return value

    def end(self, *names: str) -> None:
        """Raise `UsageError` if there is more than what was taken: ``names``."""
        for name in self._values:
            raise UsageError(
                f"{self.place}: {name}: there is no such property; there are {', '.join(names)}"
            )


def object_of_json(text: str, place: str) -> dict[str, object]:
    """What is a JSON object; raises `UsageError`, which begins with ``place``."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{place}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{place}: an object is expected")
    return value
