"""``-o NAME=VALUE,...``: the options of a new image, as ``qemu-img create`` has them.

Options are parted by commas, a comma in a value is doubled. Each is told by its name if its value
is not allowed; what goes with what is told by `pynbd.block.qcow2.create`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import click

from pynbd.block.chain import FORMATS
from pynbd.block.new_file import Preallocation
from pynbd.block.qcow2.format import CompressionType
from pynbd.cli.completion import file_names
from pynbd.cli.numbers import power_of_two, size_in_bytes
from pynbd.errors import UsageError

_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])
_OPTION = re.compile(r"(?:[^,]|,,)+")
_COMPAT = {"0.10": "0.10", "1.1": "1.1", "v2": "0.10", "v3": "1.1"}


def one_of(allowed: Iterable[str], meaning: Callable[[str], Any] = str) -> Callable[[str], Any]:
    """The type of an option that is one of a few words."""
    words = list(allowed)

    def convert(value: str) -> Any:
        if value not in words:
            raise click.BadParameter(f"{value!r} is not one of {', '.join(words)}")
        return meaning(value)

    return convert


_SWITCHES = {"on": True, "off": False, "yes": True, "no": False, "true": True, "false": False}
_SWITCH = one_of(_SWITCHES, _SWITCHES.__getitem__)

# By the names of -o, which are those of `NewImage`; each as the type of an option.
TYPES: dict[str, Callable[[str], Any]] = {
    "size": size_in_bytes,
    "backing_file": str,
    "backing_fmt": one_of(FORMATS),
    "compat": one_of(_COMPAT, _COMPAT.__getitem__),
    "cluster_size": power_of_two(512, 2 << 20),
    "extended_l2": _SWITCH,
    "compression_type": one_of(
        map(str, CompressionType), lambda name: CompressionType[name.upper()]
    ),
    "refcount_bits": power_of_two(1, 64),
    "lazy_refcounts": _SWITCH,
    "preallocation": one_of(Preallocation, Preallocation),
    "data_file": str,
    "data_file_raw": _SWITCH,
}


def options_option(command: _Decorated) -> _Decorated:
    """Give a command ``-o``; its value is one dict, for `create_image`."""
    return click.option(
        "-o",
        "--options",
        "texts",
        metavar="NAME=VALUE,...",
        multiple=True,
        callback=_parsed,
        help=f"Options of the new image as of qemu-img; repeatable. There are {', '.join(TYPES)}.",
    )(command)


def backing_options(letter: str, help_text: str) -> Callable[[_Decorated], _Decorated]:
    """Give a command ``--backing``, with this letter, and ``--backing-format``."""
    backing = click.option(
        letter,
        "--backing",
        "backing_file",
        metavar="FILE",
        shell_complete=file_names,
        help=f"{help_text}; a relative name is looked for beside the new image (default: none).",
    )
    backing_format = click.option(
        "-F",
        "--backing-format",
        "backing_fmt",
        type=click.Choice(FORMATS),
        help="The format of that file; it is never guessed.",
    )
    return lambda command: backing(backing_format(command))


def _parsed(
    _context: click.Context, _parameter: click.Parameter, texts: tuple[str, ...]
) -> dict[str, Any]:
    options = {}
    for text in texts:
        for option in _OPTION.findall(text):
            name, equals, value = option.replace(",,", ",").partition("=")
            if name not in TYPES:
                raise UsageError(f"-o {name}: no option of a new image; {', '.join(TYPES)} are")
            if not equals:
                raise UsageError(f"-o {name}: a value is expected, {name}=VALUE")
            try:
                options[name] = TYPES[name](value)
            except click.BadParameter as error:
                raise UsageError(f"-o {name}: {error.message}") from None
    return options


def with_named_options(texts: dict[str, Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """The options of ``-o``, and those that have an option of their own; None is none."""
    options = dict(texts)
    for name, value in named.items():
        if value is None:
            continue
        if name in options:
            raise UsageError(f"-o {name}: it is given twice, by an option of its own, too")
        options[name] = TYPES[name](value) if isinstance(value, str) else value
    return options
