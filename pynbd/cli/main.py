"""``pynbd``: the program and its subcommands.

An error is one line on standard error and exit status 1; arguments that make no sense are exit
status 2.
"""

from __future__ import annotations

import sys

import click
from click.exceptions import NoArgsIsHelpError

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
        # The status where click ends it (--help), and None where a subcommand returns.
        sys.exit(commands(prog_name="pynbd", standalone_mode=False))
    except NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        _complain(_text(error), error.exit_code)
    except UsageError as error:
        _complain(str(error), 2)
    except (PynbdError, OSError) as error:
        _complain(str(error), 1)
    except click.Abort:
        _complain("interrupted", 1)


def _text(error: click.ClickException) -> str:
    """What click has to say, as everything else here is said."""
    if type(error) is click.BadParameter and error.param:
        return f"{max(error.param.opts, key=len)}: {error.message.rstrip('.')}"
    text = " ".join(error.format_message().split())
    return text[:1].lower() + text[1:].rstrip(".")


def _complain(text: str, status: int) -> None:
    click.echo(f"pynbd: {text}", err=True)
    sys.exit(status)
