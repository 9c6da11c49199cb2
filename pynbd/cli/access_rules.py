"""``--allow`` and ``--access``: the rules of `pynbd.server.access`, as options and in a file.

    --allow write,psk=alice,address=192.0.2.0/24       a comma in a value is doubled

    [exports.disk]                                     the export of that name; "" is one without
    allow = [
        { right = "write", psk = "alice", address = "192.0.2.0/24" },
        { right = "read" },
    ]

Every export that is served has its table. Every mistake is one line that names its place: a rule
that nobody could ever meet is one, because whoever wrote it expects something else.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pynbd.cli.keyval import parse_keyval
from pynbd.errors import UsageError
from pynbd.server.access import CONDITIONS, Allow
from pynbd.server.reach import Reach

_KEYS = ("right", *CONDITIONS)
_TLS = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}
_BARE = re.compile(r"[A-Za-z0-9_-]+")  # a key that TOML takes without quotes


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule, and where it stands."""

    place: str
    allow: Allow


def allowed(texts: Iterable[str]) -> list[Rule]:
    """The rules of ``--allow``. Raises `UsageError`."""
    return [_rule(_pairs(text, place), place) for text in texts for place in [f"--allow {text!r}"]]


def allowed_in_file(path: str, names: Collection[str]) -> dict[str, list[Rule]]:
    """The rules of ``--access`` for the exports of these names. Raises `UsageError`, `OSError`."""
    try:
        content = tomllib.loads(Path(path).read_bytes().decode())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not TOML: {error}") from None
    tables = _member(content, "exports", path)
    if not isinstance(tables, dict):
        raise UsageError(f"{path}: exports: tables [exports.NAME] are expected")
    for name in tables:
        if name not in names:
            there = ", ".join(map(_table, names))
            raise UsageError(f"{path}: {_table(name)}: no such export is served; there is {there}")
    found = {}
    for name in names:
        place = f"{path}: {_table(name)}"
        if name not in tables:
            raise UsageError(f"{place} is missing: every export that is served has its table")
        if not isinstance(tables[name], dict):
            raise UsageError(f"{place}: a table is expected")
        found[name] = _list(_member(tables[name], "allow", place), f"{place}: allow")
    return found


def check(rules: Iterable[Rule], reach: Reach) -> None:
    """Raise `UsageError` for a rule that no client could ever meet."""
    for rule in rules:
        wrong = reach.hinders(rule.allow)
        if wrong:
            raise UsageError(f"{rule.place}: nobody could meet it: {wrong}")


def _pairs(text: str, place: str) -> dict[str, object]:
    """The keys of ``--allow``; each once."""
    if (len(text) - len(text.rstrip(","))) % 2:
        # A condition was to follow: one less would let more people in.
        raise UsageError(f"{place}: nothing follows the last comma; KEY=VALUE is expected")
    values: dict[str, object] = {}
    for key, value in parse_keyval(text, "right", place):
        if key in values:
            raise UsageError(f"{place}: {key} is given twice; one value is expected")
        values[key] = _TLS.get(value, value) if key == "tls" else value
    return values


def _list(rules: object, place: str) -> list[Rule]:
    if not isinstance(rules, list):
        raise UsageError(f'{place}: a list of rules is expected, [{{ right = "read" }}]')
    found = []
    for number, values in enumerate(rules, 1):
        here = f"{place}: rule {number}"
        if not isinstance(values, dict):
            raise UsageError(f'{here}: {values!r}: {{ right = "read", ... }} is expected')
        found.append(_rule(values, here))
    return found


def _rule(values: Mapping[str, object], place: str) -> Rule:
    for key in values:
        if key not in _KEYS:
            raise UsageError(f"{place}: {key}: there is no such key; there are {', '.join(_KEYS)}")
    if "right" not in values:
        raise UsageError(f"{place}: right: read or write is expected")
    try:
        return Rule(place, Allow(**values))  # type: ignore[arg-type]  # it checks what it gets
    except UsageError as error:
        raise UsageError(f"{place}: {error}") from None


def _member(table: Mapping[str, object], name: str, place: str) -> object:
    """The one that there has to be, and no other."""
    for key in table:
        if key != name:
            raise UsageError(f"{place}: {key}: there is no such key; there is {name}")
    if name not in table:
        raise UsageError(f"{place}: {name} is missing")
    return table[name]


def _table(name: str) -> str:
    return f"[exports.{name if _BARE.fullmatch(name) else json.dumps(name, ensure_ascii=False)}]"
