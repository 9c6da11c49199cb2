"""``pynbd``: the program and its subcommands.

A subcommand is imported when it is asked for: a server does not wait for what only others need.
"""

from __future__ import annotations

from typing import ClassVar

import click

from pynbd.cli import complaints
from pynbd.cli.imports import imported


class _Subcommands(complaints.Told, click.Group):
    """Each in the module of its name, in the order in which --help lists them."""

    modules: ClassVar = {
        "serve": "pynbd.cli.serve",
        "info": "pynbd.cli.info",
        "ls": "pynbd.cli.ls",
        "map": "pynbd.cli.map",
        "copy": "pynbd.cli.copy",
        "compare": "pynbd.cli.compare",
        "create": "pynbd.cli.create",
        "check": "pynbd.cli.check",
        "demo": "pynbd.cli.demo",
        "completion": "pynbd.cli.completion",
        "man": "pynbd.cli.man",
    }

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.modules)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.modules:
            return None
        command: click.Command = getattr(imported(self.modules[cmd_name]), cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.modules and not args[0].startswith("-"):
            there = ", ".join(self.modules)
            raise click.UsageError(f"no command {args[0]!r}; there are {there}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=_Subcommands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pynbd", prog_name="pynbd")
def commands() -> None:
    """Serve disk images over NBD, look into them, copy and compare them."""


def main() -> None:
    """Run the command line of this process."""
    complaints.run(commands, "pynbd")
