"""How a program of ours ends: an error is one line on standard error, and a status.

1 for an error, 2 for arguments that make no sense (what `run` is told, where that differs).
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import click
from click.exceptions import NoArgsIsHelpError

from pynbd.cli.logs import last_words
from pynbd.errors import PynbdError, UsageError


class Told(click.Command):
    """A command whose broken pipes are told.

    click takes every broken pipe for that of a reader who has left, and ends without a word. That
    of a connection has a name.
    """

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            if error.filename is None:
                raise
            raise PynbdError(said_of(error)) from None


def run(command: click.Command, name: str, *, usage_status: int = 2) -> NoReturn:
    """Run the command line of this process."""
    try:
        # The status where click ends it (--help), and None where a command returns.
        sys.exit(command(prog_name=name, standalone_mode=False))
    except NoArgsIsHelpError as error:
        error.show()
        sys.exit(usage_status)
    except click.UsageError as error:
        complain(name, _text(error), usage_status)
    except click.ClickException as error:
        complain(name, _text(error), error.exit_code)
    except UsageError as error:
        complain(name, str(error), usage_status)
    except (PynbdError, OSError) as error:
        complain(name, said_of(error), 1)
    except click.Abort:
        complain(name, "interrupted", 1)


def _text(error: click.ClickException) -> str:
    """What click has to say, as everything else here is said."""
    if type(error) is click.BadParameter and error.param:
        return f"{max(error.param.opts, key=len)}: {error.message.rstrip('.')}"
    text = " ".join(error.format_message().split())
    return text[:1].lower() + text[1:].rstrip(".")


def said_of(error: PynbdError | OSError) -> str:
    """What an error says, and of what file or URI."""
    if not isinstance(error, OSError):
        return str(error)
    where = f"{error.filename}: " if error.filename else ""
    return where + (error.strerror or str(error))


def complain(name: str, text: str, status: int) -> NoReturn:
    """One line, and the end."""
    last_words(name, text)
    sys.exit(status)
