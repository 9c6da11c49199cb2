"""``pynbd completion``: the script with which a shell completes our command lines.

The script asks the program itself, which knows its options and their choices; see "Shell
Completion" in the documentation of click.
"""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem, get_completion_class

from pynbd.cli.output import standard_output

_SHELLS = ("bash", "zsh", "fish")
_PROGRAMS = ("pynbd", "pynbd-qemu-nbd")


def file_names(
    _context: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """The ``shell_complete`` of an argument or an option that takes the name of a file."""
    return [CompletionItem(incomplete, type="file")]


def directory_names(
    _context: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """The same of one that takes the name of a directory."""
    return [CompletionItem(incomplete, type="dir")]


@click.command(
    short_help="Print what makes a shell complete.",
    epilog="""\b
Where shells look for it:
  bash  ~/.local/share/bash-completion/completions/pynbd
  zsh   _pynbd, in a directory of $fpath
  fish  ~/.config/fish/completions/pynbd.fish

\b
Examples:
  eval "$(pynbd completion bash)"
  pynbd completion fish > ~/.config/fish/completions/pynbd.fish
  pynbd completion zsh --program pynbd-qemu-nbd > ~/.zfunc/_pynbd-qemu-nbd
""",
)
@click.argument("shell", type=click.Choice(_SHELLS))
@click.option(
    "--program",
    type=click.Choice(_PROGRAMS),
    default=_PROGRAMS[0],
    show_default=True,
    help="The program to complete.",
)
def completion(shell: str, program: str) -> None:
    """Print what makes SHELL complete subcommands, options, their choices, and file names."""
    complete = get_completion_class(shell)
    assert complete is not None
    variable = f"_{program.replace('-', '_').upper()}_COMPLETE"
    with standard_output() as write:
        write(complete(click.Command(program), {}, program, variable).source() + "\n")
