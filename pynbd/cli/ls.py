"""``pynbd ls``: the exports of a server."""

from __future__ import annotations

import asyncio
import json

import click

from pynbd.cli.export_info import export_info
from pynbd.cli.export_report import export_report, listing
from pynbd.cli.logs import told
from pynbd.cli.output import standard_output
from pynbd.client.connecting import list_exports
from pynbd.errors import UsageError
from pynbd.protocol.uri import NbdUri, is_uri


@click.command(
    short_help="List the exports of a server.",
    epilog="""\b
Examples:
  pynbd ls nbd://localhost
  pynbd ls --long 'nbd+unix:///?socket=/run/disks.sock'
  pynbd ls --json nbd://localhost
""",
)
@click.argument("uri", metavar="URI")
@click.option(
    "-l", "--long", "everything", is_flag=True, help="Tell all of each (default: a line of each)."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON (default: text).")
@told
def ls(uri: str, everything: bool, as_json: bool) -> None:
    """List the exports of the server at URI, whichever export it names: name, size, what they can,
    description.
    """
    if not is_uri(uri):
        raise UsageError(f"URI: {uri!r} is not an NBD URI, such as nbd://localhost")
    where = NbdUri.parse(uri)
    exports = [export_info(export, where) for export in asyncio.run(list_exports(where))]
    with standard_output() as write:
        if as_json:
            write(json.dumps(exports, indent=4) + "\n")
        elif everything:
            write("\n".join(map(export_report, exports)))
        elif exports:
            write(listing(exports))
