"""The two languages in which QEMU's tools take an image that is more than a file name (pure).

* ``--image-opts``: ``driver=qcow2,file.driver=file,file.filename=disk.qcow2``. Options are parted
  by commas, a comma in a value is doubled, the value of a repeated option is the last one. An
  option without ``=`` is "on", or "off" if its name begins with ``no``; as the first of all it is
  the value of ``file``.
* ``json:{...}`` as a file name: an object whose members are the same options; strings may have
  single quotes.

In both, ``a.b`` is member b of object a. Both make one nested dict, in which the texts of
``--image-opts`` are still strings: `pynbd.block.node_options` says what each must be.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from pynbd.errors import UsageError

JSON_PREFIX = "json:"
# Objects within objects: a chain of as many layers as there may be, and each on a file.
MAX_NESTING = 300

_STRING = re.compile(r""""(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'""")
_INNER = re.compile(r"""\\.|\"""")
_VALUE = re.compile(r"(?:[^,]|,,)*")
_NAME = re.compile(r"[^=,]*")


def parse_image_opts(text: str) -> dict[str, object]:
    """The options of ``--image-opts``, nested. Raises `UsageError`."""
    flat: dict[str, object] = {}
    at = 0
    while at < len(text):
        name_match = _NAME.match(text, at)
        assert name_match is not None
        name = name_match[0]
        value_at = name_match.end()
        if text.startswith("=", value_at):
            value_match = _VALUE.match(text, value_at + 1)
        elif at == 0:
            name = "file"
            value_match = _VALUE.match(text)
        else:
            value_match = None
        if value_match is not None:
            flat[name] = value_match[0].replace(",,", ",")
            at = value_match.end() + 1
        else:
            is_off = name.startswith("no")
            name = name.removeprefix("no")
            flat[name] = "off" if is_off else "on"
            at = value_at + 1
        if not name:
            raise UsageError(f"image options {text!r}: an option without a name; NAME=VALUE,...")
    return nested(flat, f"image options {text!r}")


def parse_json_name(name: str) -> dict[str, object]:
    """The options in a file name ``json:{...}``, nested. Raises `UsageError`."""
    place = f"image {name!r}"
    try:
        value = json.loads(_STRING.sub(_double_quoted, name.removeprefix(JSON_PREFIX)))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{place}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{place}: an object of options is wanted, json:{{...}}")
    return nested(value, place)


def nested(options: Mapping[str, object], place: str) -> dict[str, object]:
    """Options whose names may be dotted, with a dict for each object. Raises `UsageError`."""
    tree: dict[str, object] = {}
    _plant(tree, options, "", place)
    return tree


def _plant(tree: dict[str, object], options: Mapping[str, object], path: str, place: str) -> None:
    for name, value in options.items():
        if f"{path}{name}".count(".") > MAX_NESTING:
            raise UsageError(f"{place}: options within more than {MAX_NESTING} others")
        *parents, last = str(name).split(".")
        branch = tree
        for parent in parents:
            inner = branch.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise _contradiction(place, path + str(name))
            branch = inner
        there = branch.get(last)
        if isinstance(value, Mapping):
            inner = branch.setdefault(last, {})
            if not isinstance(inner, dict):
                raise _contradiction(place, path + str(name))
            _plant(inner, value, f"{path}{name}.", place)
        elif isinstance(there, dict):
            raise _contradiction(place, path + str(name))
        else:
            branch[last] = value


def _contradiction(place: str, name: str) -> UsageError:
    return UsageError(f"{place}: {name!r} is given both as a value and as an object of options")


def _double_quoted(found: re.Match[str]) -> str:
    """A string of QEMU's JSON as one of JSON: in double quotes."""
    text = found[0]
    if text.startswith('"'):
        return text
    return f'"{_INNER.sub(_requoted, text[1:-1])}"'


def _requoted(found: re.Match[str]) -> str:
    return {'"': r"\"", r"\'": "'"}.get(found[0], found[0])
