"""``pynbd``: the program and its subcommands.

An error is one line on standard error and exit status 1; arguments that make no sense are exit
status 2.
"""

from __future__ import annotations

import sys

import click

from pynbd.cli.serve import serve
from pynbd.errors import PynbdError, UsageError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pynbd", prog_name="pynbd")
def commands() -> None:
    """Serve disk images over NBD."""


commands.add_command(serve)


def main() -> None:
    """Run the command line of this process."""
    try:
        commands(prog_name="pynbd")
    except UsageError as error:
        _complain(error, 2)
    except (PynbdError, OSError) as error:
        _complain(error, 1)


def _complain(error: Exception, status: int) -> None:
    click.echo(f"pynbd: {error}", err=True)
    sys.exit(status)
