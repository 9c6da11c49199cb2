"""What `image_info` found, as people read it (pure)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from pynbd.cli.image_info import Info
from pynbd.cli.output import heading, in_units, printable, table

_DEEPEST_INDENT = 12


def report(chain: Sequence[Info]) -> str:
    """The image, its chain, its snapshots and bitmaps; those of the layers below after these."""
    parts = [_summary(chain[0])]
    if len(chain) > 1:
        parts.append(_tree(chain))
    elif "backing-filename" in chain[0]:
        parts[0] += (
            f"backing:   {printable(chain[0]['backing-filename'])}, which is not looked at\n"
        )
    for info in chain:
        name = "" if info is chain[0] else f" of {_base(info)}"
        if snapshots := info.get("snapshots"):
            parts.append(heading(f"Internal snapshots{name}:") + "\n" + _snapshots(snapshots))
        if bitmaps := _specific(info).get("bitmaps"):
            parts.append(
                heading(f"Dirty bitmaps{name}:") + "\n" + _bitmaps(bitmaps, info["virtual-size"])
            )
    return "\n".join(parts)


def _summary(info: Info) -> str:
    lines = {
        "image": printable(info["filename"]),
        "format": _format(info),
        "size": exactly(info["virtual-size"]),
        "on disk": in_units(info["actual-size"]),
    }
    if "cluster-size" in info:
        compression = _specific(info)["compression-type"]
        lines["clusters"] = f"{in_units(info['cluster-size'])}, compression {compression}"
    if "data-file" in _specific(info):
        raw = ", readable as a raw image" if _specific(info)["data-file-raw"] else ""
        lines["data file"] = printable(str(_specific(info)["data-file"])) + raw
    if features := ", ".join(_features(info)):
        lines["features"] = features
    if troubles := ", ".join(_troubles(info)):
        lines["beware"] = troubles
    return "".join(f"{name + ':':10} {value}\n" for name, value in lines.items())


def exactly(size: int) -> str:
    """A size in units, and to the byte."""
    return f"{in_units(size)} ({size} bytes)" if size >= 1 << 10 else f"{size} bytes"


def _format(info: Info) -> str:
    if info["format"] == "raw":
        return "raw"
    compat = _specific(info)["compat"]
    return f"qcow2, version {2 if compat == '0.10' else 3} (compat {compat})"


def _features(info: Info) -> Iterator[str]:
    specific = _specific(info)
    if specific.get("extended-l2"):
        yield "extended L2 entries (subclusters)"
    if specific.get("lazy-refcounts"):
        yield "lazy refcounts"
    if specific.get("refcount-bits", 16) != 16:
        yield f"refcounts of {specific['refcount-bits']} bits"


def _troubles(info: Info) -> Iterator[str]:
    if _specific(info).get("corrupt"):
        yield "marked corrupt (qemu-img check tells more)"
    if info["dirty-flag"]:
        yield "not closed properly: its refcounts are out of date"


def _tree(chain: Sequence[Info]) -> str:
    rows = [("FILE", "FORMAT", "SIZE", "ON DISK", "")]
    for depth, info in enumerate(chain):
        indent = "   " * (min(depth, _DEEPEST_INDENT) - 1) + "└─ " if depth else ""
        rows.append(
            (
                indent + _base(info),
                info["format"],
                in_units(info["virtual-size"]),
                in_units(info["actual-size"]),
                ", ".join(_notes(info)),
            )
        )
    return (
        heading(f"Backing chain, {len(chain)} layers, the active one first:") + "\n" + table(rows)
    )


def _notes(info: Info) -> Iterator[str]:
    yield from _troubles(info)
    if data_file := _specific(info).get("data-file"):
        yield f"data in {printable(os.path.basename(data_file))}"
    for key, found in (
        ("snapshot", info.get("snapshots", ())),
        ("bitmap", _specific(info).get("bitmaps", ())),
    ):
        if found:
            yield f"{len(found)} {key}{'s' * (len(found) > 1)}"


def _snapshots(snapshots: Sequence[Info]) -> str:
    rows = [("ID", "NAME", "TAKEN", "VM STATE", "VM CLOCK")]
    for one in snapshots:
        minutes, second = divmod(one["vm-clock-sec"], 60)
        clock = f"{minutes // 60}:{minutes % 60:02}:{second:02}.{one['vm-clock-nsec'] // 10**6:03}"
        taken = datetime.fromtimestamp(one["date-sec"]).isoformat(" ", "seconds")
        state = in_units(one["vm-state-size"]) if one["vm-state-size"] else "-"
        rows.append((printable(one["id"]), printable(one["name"]), taken, state, clock))
    return table(rows)


def _bitmaps(bitmaps: Sequence[Info], size: int) -> str:
    rows = [("NAME", "GRANULARITY", "RECORDING", "DIRTY")]
    for one in bitmaps:
        if "dirty-bytes" in one:
            recording = "yes" if "auto" in one["flags"] else "no"
            dirty = f"{in_units(one['dirty-bytes'])} ({one['dirty-bytes'] / max(size, 1):.1%})"
        else:
            recording, dirty = "-", "unknown: not saved by who has it in use, or had"
        rows.append((printable(one["name"]), in_units(one["granularity"]), recording, dirty))
    return table(rows)


def _base(info: Info) -> str:
    return printable(os.path.basename(info["filename"]))


def _specific(info: Info) -> dict[str, Any]:
    specific: dict[str, Any] = info.get("format-specific", {}).get("data", {})
    return specific
