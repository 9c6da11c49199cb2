"""The argument vector is read as getopt_long(3) reads it: getopt(1) is that as a program."""

from __future__ import annotations

import shlex
import subprocess
from typing import Any, ClassVar

import click
import pytest
from click.testing import CliRunner

from pynbd.cli.qemu_nbd.getopt import GetoptCommand


class _Command(GetoptCommand):
    once: ClassVar = (frozenset({"-n", "--nocache", "--cache"}),)


@click.command(cls=_Command)
@click.argument("file", nargs=-1)
@click.option("-k", "--socket")
@click.option("-p", "--port")
@click.option("-t", "--persistent", is_flag=True)
@click.option("-r", "--read-only", is_flag=True)
@click.option("--fork", is_flag=True)
@click.option("--pid-file")
@click.option("-B", "--bitmap", multiple=True)
@click.option("-n", "--nocache", is_flag=True)
@click.option("--cache")
def command(**options: Any) -> None:
    click.echo(repr(options))


SHORT = "k:p:trB:n"
LONG = "socket:,port:,persistent,read-only,fork,pid-file:,bitmap:,nocache,cache:,help"
NAMES = {
    "-k": "--socket",
    "-p": "--port",
    "-t": "--persistent",
    "-r": "--read-only",
    "-B": "--bitmap",
    "-n": "--nocache",
}
FLAGS = ("--persistent", "--read-only", "--fork", "--nocache")

TAKEN = """
-k /path disk
-k/path disk
-k=/path disk
disk -k /path
disk --socket=/path one two
disk --socket /path -t
-trk/path disk
-tr -- -k disk
--pers disk --read
--so=/path --pi /file
--socket= disk
-k '' disk
-B a -B b --bitmap=c --bit d
-k -t disk
--socket --fork disk
disk - -t
-p ' 2' disk
'-p 2' disk
--port=a=b
--cache none
-- --
""".strip().splitlines()

REFUSED = """
--bogus
-x
-k
--socket
--p 1
--p=1
--fork=1
-tx
-r --read-onlyy
'-?'
""".strip().splitlines()


def getopt(line: str) -> subprocess.CompletedProcess[str]:
    args = ["getopt", "-n", "test", "-o", SHORT, "-l", LONG, "--", *shlex.split(line)]
    return subprocess.run(args, check=False, capture_output=True, text=True)


def expected(line: str) -> dict[str, Any]:
    options: dict[str, Any] = {
        "file": (),
        "socket": None,
        "port": None,
        "pid_file": None,
        "cache": None,
        "bitmap": (),
        **{name[2:].replace("-", "_"): False for name in FLAGS},
    }
    words = iter(shlex.split(getopt(line).stdout))
    for word in words:
        if word == "--":
            break
        name = NAMES.get(word, word)
        key = name[2:].replace("-", "_")
        if name in FLAGS:
            options[key] = True
        elif key == "bitmap":
            options[key] += (next(words),)
        else:
            options[key] = next(words)
    return {**options, "file": tuple(words)}


@pytest.mark.parametrize("line", TAKEN)
def test_taken(line: str) -> None:
    done = CliRunner().invoke(command, shlex.split(line))
    assert done.exit_code == 0, done.output
    # repr of a dict that click made, in its order
    assert dict(eval(done.output)) == expected(line)


@pytest.mark.parametrize("line", REFUSED)
def test_refused(line: str) -> None:
    assert getopt(line).returncode == 1
    assert CliRunner().invoke(command, shlex.split(line)).exit_code == 2


@pytest.mark.parametrize("line", ["-n --cache=none", "-nn", "--cache=a --cache b", "--noc -n"])
def test_given_once_only(line: str) -> None:
    done = CliRunner().invoke(command, shlex.split(line))
    assert done.exit_code == 2
    assert "-n, --cache, --nocache: to be given once only" in done.output


@pytest.mark.parametrize("line", ["-h", "--help", "--he"])
def test_help(line: str) -> None:
    command.context_settings = {"help_option_names": ["-h", "--help"]}
    assert CliRunner().invoke(command, [line]).output.startswith("Usage:")
