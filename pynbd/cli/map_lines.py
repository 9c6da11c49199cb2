"""The lines of a map and of its totals: text and JSON as ``nbdinfo --map`` of libnbd prints them,
and the same for several contexts side by side (pure).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence

from pynbd.cli.map_rows import Rows
from pynbd.protocol.metadata import BASE_ALLOCATION, QEMU_ALLOCATION_DEPTH, QEMU_DIRTY_BITMAP

_ALLOCATION = ("data", "hole", "zero", "hole,zero")
_DIRTINESS = ("clean", "dirty")
_LONGEST = len("backing depth 200")


def description(context: str, status: int) -> str | None:
    """What a status means, in the words of nbdinfo; None if nobody knows."""
    if context == QEMU_ALLOCATION_DEPTH:
        return {0: "absent", 1: "local"}.get(status, f"backing depth {status}")
    if context == BASE_ALLOCATION:
        words: Sequence[str] = _ALLOCATION
    else:
        words = _DIRTINESS if context.startswith(QEMU_DIRTY_BITMAP) else ()
    return words[status] if status < len(words) else None


class TextMap:
    """One line a row; one context, as nbdinfo, or a table with a heading for several."""

    def __init__(self, contexts: Sequence[str], size: int) -> None:
        self._contexts = contexts
        self._digits = 10 if len(contexts) == 1 else max(10, len(str(size)))
        self._widths = [max(len(context), _LONGEST) for context in contexts]

    def head(self) -> str:
        if len(self._contexts) == 1:
            return ""
        names = _columns(self._contexts, self._widths)
        return f"{'offset':>{self._digits}}  {'length':>{self._digits}}  {names}\n"

    def lines(self, rows: Rows) -> str:
        combinations, which = rows.combinations()
        tails = [self._tail(statuses) for statuses in combinations]
        line = f"%{self._digits}d  %{self._digits}d  %s\n"
        columns = rows.offsets.tolist(), rows.lengths.tolist(), [tails[i] for i in which.tolist()]
        return "".join([line % row for row in zip(*columns, strict=True)])

    def _tail(self, statuses: Sequence[int]) -> str:
        if len(statuses) == 1:
            word = description(self._contexts[0], statuses[0])
            return f"{statuses[0]:3}" + (f"  {word}" if word else "")
        return _columns(_words(self._contexts, statuses), self._widths)

    def foot(self) -> str:
        return ""


class JsonMap:
    """A list of objects: offset, length, and type and description, which with several contexts are
    an object under the name of each.
    """

    def __init__(self, contexts: Sequence[str]) -> None:
        self._contexts = contexts
        self._begun = False

    def head(self) -> str:
        return "[\n"

    def lines(self, rows: Rows) -> str:
        if not len(rows):
            return ""
        combinations, which = rows.combinations()
        tails = [_json_status(self._contexts, statuses) for statuses in combinations]
        columns = rows.offsets.tolist(), rows.lengths.tolist(), [tails[i] for i in which.tolist()]
        line = '{ "offset": %d, "length": %d, %s}'
        text = ",\n".join([line % row for row in zip(*columns, strict=True)])
        begun, self._begun = self._begun, True
        return ",\n" + text if begun else text

    def foot(self) -> str:
        return "\n]\n"


class Totals:
    """Bytes of each status, or of each combination of them."""

    def __init__(self, contexts: Sequence[str], size: int) -> None:
        self._contexts = contexts
        self._size = size
        self._bytes: Counter[tuple[int, ...]] = Counter()

    def add(self, rows: Rows) -> None:
        combinations, which = rows.combinations()
        lengths = rows.lengths
        for number, combination in enumerate(combinations):
            self._bytes[combination] += int(lengths[which == number].sum())

    def _sums(self) -> Iterator[tuple[tuple[int, ...], int, float]]:
        for statuses, count in sorted(self._bytes.items()):
            yield statuses, count, 100.0 * count / self._size

    def text(self) -> str:
        if len(self._contexts) == 1:
            return "".join(
                f"{count:10} {percent:5.1f}% {statuses[0]:3}"
                + (f" {word}\n" if (word := description(self._contexts[0], statuses[0])) else "\n")
                for statuses, count, percent in self._sums()
            )
        widths = [max(len(context), _LONGEST) for context in self._contexts]
        return f"{'size':>10} {'':6}  {_columns(self._contexts, widths)}\n" + "".join(
            f"{count:10} {percent:5.1f}%  {_columns(_words(self._contexts, statuses), widths)}\n"
            for statuses, count, percent in self._sums()
        )

    def json(self) -> str:
        lines = [
            f'{{ "size": {count}, "percent": {percent:g}, '
            f"{_json_status(self._contexts, statuses)} }}"
            for statuses, count, percent in self._sums()
        ]
        return "[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n"


def _words(contexts: Sequence[str], statuses: Sequence[int]) -> list[str]:
    return [
        description(context, status) or str(status)
        for context, status in zip(contexts, statuses, strict=True)
    ]


def _columns(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _json_status(contexts: Sequence[str], statuses: Sequence[int]) -> str:
    said = {
        context: {"type": status} | ({"description": word} if word else {})
        for context, status in zip(contexts, statuses, strict=True)
        for word in [description(context, status)]
    }
    whole = json.dumps(next(iter(said.values())) if len(said) == 1 else said)
    return whole[1:-1]
