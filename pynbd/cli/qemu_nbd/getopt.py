"""A click command whose argument vector is read as getopt_long(3) reads it.

Beyond what click takes by itself: long options may be abbreviated as long as that is unambiguous.
The options and the help are click's own.
"""

from __future__ import annotations

import getopt
from collections.abc import Collection
from typing import ClassVar

import click

from pynbd.cli.complaints import Told


class GetoptCommand(Told):
    """``once``: sets of options that mean the same, and of which one may be given, one time."""

    once: ClassVar[Collection[frozenset[str]]] = ()

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read ``args``; what click gets has whole names, and the operands behind all options."""
        if ctx.resilient_parsing:  # a shell completes what is not complete yet
            return super().parse_args(ctx, args)
        short, long, whole = "", [], {}
        for option in self.get_params(ctx):
            if isinstance(option, click.Option):
                takes_value = not (option.is_flag or option.count)
                for name in option.opts:
                    whole[name] = max(option.opts, key=len) + "=" * takes_value
                    if name.startswith("--"):
                        long.append(name[2:] + "=" * takes_value)
                    else:
                        short += name[1:] + ":" * takes_value
        try:
            options, operands = getopt.gnu_getopt(args, short, long)
        except getopt.GetoptError as error:
            raise click.UsageError(error.msg, ctx) from None
        for alike in self.once:
            if sum(name in alike for name, _ in options) > 1:
                names = ", ".join(sorted(alike, key=len))
                raise click.UsageError(f"{names}: to be given once only", ctx)
        named = [whole[name] + value for name, value in options]
        return super().parse_args(ctx, [*named, "--", *operands])
