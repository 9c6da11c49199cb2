"""What `export_info` found, as people read it (pure)."""

from __future__ import annotations

from collections.abc import Sequence

from pynbd.cli.export_info import Info
from pynbd.cli.image_report import exactly
from pynbd.cli.output import heading, in_units, printable, table


def server_report(uri: str, server: Info) -> str:
    """The server, then its exports."""
    encrypted = "with TLS" if server["TLS"] else "without TLS"
    if server["extended"]:
        headers = "extended headers"
    else:
        headers = "structured replies" if server["structured"] else "simple replies"
    lines = f"server:     {uri}\nprotocol:   {server['protocol']} {encrypted}, {headers}\n"
    return "\n".join([lines, *map(export_report, server["exports"])])


def export_report(export: Info) -> str:
    """One export, all that is known."""
    lines = {
        "size": exactly(export["export-size"]),
        "access": _access(export),
        "can": ", ".join(_can(export)) or "nothing more than read",
        "uri": export["uri"],
    }
    if "description" in export:
        lines = {"description": printable(export["description"])} | lines
    if "block_size_minimum" in export:
        lines["blocks"] = (
            f"{in_units(export['block_size_minimum'])} at least,"
            f" {in_units(export['block_size_preferred'])} preferred,"
            f" {in_units(export['block_size_maximum'])} at most"
        )
    title = heading(f"Export {_name(export)}:") + "\n"
    told = "".join(f"  {name + ':':12} {value}\n" for name, value in lines.items())
    contexts = "".join(f"    {printable(context)}\n" for context in export["contexts"])
    return title + told + (f"  contexts:\n{contexts}" if contexts else "")


def listing(exports: Sequence[Info]) -> str:
    """A table, one export a line."""
    rows = [("NAME", "SIZE", "FLAGS", "DESCRIPTION")]
    rows += [
        (
            _name(export),
            in_units(export["export-size"]),
            ", ".join([_access(export), *_can(export)]),
            printable(export.get("description", "")),
        )
        for export in exports
    ]
    return table(rows, indent="")


def _access(export: Info) -> str:
    return "read-only" if export["is_read_only"] else "read-write"


def _can(export: Info) -> list[str]:
    can = [
        name.removeprefix("can_").replace("_", "-")
        for name, value in export.items()
        if name.startswith("can_") and value
    ]
    return can + ["rotational"] * export["is_rotational"]


def _name(export: Info) -> str:
    return printable(export["export-name"]) or '""'
