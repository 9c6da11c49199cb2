"""What reaches standard error, in processes of their own: there is one set of loggers in each."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from interop import peers
from tests.cli.test_main import pynbd

SCRIPT = """
import logging
from pynbd.cli.logs import configure
configure(verbose={verbose}, trace={trace}, log_format={log_format!r})
logging.getLogger("pynbd.clients").info("%s has come", "somebody")
logging.getLogger("pynbd").warning("two\\nlines")
logging.getLogger("pynbd.trace").debug("c < hello", extra={{"trace": {{"connection": "c"}}}})
try:
    1 / 0
except ZeroDivisionError as error:
    logging.getLogger("pynbd").error("a defect", exc_info=error)
"""


def said(*, verbose: bool = False, trace: bool = False, log_format: str = "text") -> str:
    script = SCRIPT.format(verbose=verbose, trace=trace, log_format=log_format)
    line = [sys.executable, "-c", script]
    done = subprocess.run(line, capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout == ""
    return done.stderr


def test_text() -> None:
    start, _, rest = said().partition("Traceback (most recent call last):\n")
    assert start == "pynbd: two\nlines\npynbd: a defect\n"
    assert rest.endswith("ZeroDivisionError: division by zero\n")


def test_names_cannot_command_a_terminal() -> None:
    """Those in warnings, too; but a traceback has lines."""
    script = SCRIPT.replace("two", "a \\x1b[2J")
    script = script.format(verbose=False, trace=False, log_format="text")
    line = [sys.executable, "-c", script]
    done = subprocess.run(line, capture_output=True, text=True, timeout=20, check=True)
    assert done.stderr.startswith("pynbd: a ?[2J\nlines\npynbd: a defect\nTraceback")


def test_verbose_text() -> None:
    assert said(verbose=True).startswith("pynbd: somebody has come\npynbd: two\n")


def test_trace_in_text() -> None:
    assert re.search(r"(?m)^\d\d:\d\d:\d\d\.\d{6} c < hello$", said(trace=True))


@pytest.mark.parametrize("verbose", [False, True])
@pytest.mark.parametrize("trace", [False, True])
def test_json(verbose: bool, trace: bool) -> None:
    """One object a line, whatever is in it."""
    records = [
        json.loads(line)
        for line in said(verbose=verbose, trace=trace, log_format="json").splitlines()
    ]
    for record in records:
        age = datetime.now(UTC) - datetime.fromisoformat(record.pop("time"))
        assert timedelta(0) <= age < timedelta(minutes=1)
    defect = records.pop()
    traceback = defect.pop("traceback")
    assert traceback.startswith("Traceback (most recent call last):\n")
    assert traceback.endswith("ZeroDivisionError: division by zero")
    expected = [{"level": "WARNING", "logger": "pynbd", "message": "two\nlines"}]
    if verbose:
        come = {"level": "INFO", "logger": "pynbd.clients", "message": "somebody has come"}
        expected.insert(0, come)
    if trace:
        told = {"level": "DEBUG", "logger": "pynbd.trace", "message": "c < hello"}
        expected.append(told | {"connection": "c"})
    assert records == expected
    assert defect == {"level": "ERROR", "logger": "pynbd", "message": "a defect"}


def test_a_format_that_is_not_there() -> None:
    done = pynbd("serve", "--log-format", "xml", "disk")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "pynbd: --log-format: 'xml' is not one of 'text', 'json'\n"


@pytest.mark.parametrize("command", ["info", "map", "ls"])
def test_the_last_words_are_json_too(command: str) -> None:
    done = pynbd(command, "--log-format", "json", "nbd+unix:///?socket=/nowhere")
    assert (done.returncode, done.stdout) == (1, "")
    record = json.loads(done.stderr)
    assert record["level"] == "ERROR"
    assert "/nowhere" in record["message"]


def test_a_client_tells_what_passes(tmp_path: Path) -> None:
    """Each end hears what the other one says."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    with peers.socket_path() as socket:
        line = [sys.executable, "-m", "pynbd", "serve", "--trace", "-k", str(socket), str(path)]
        with subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as server:
            assert server.stdout
            uri = server.stdout.readline().strip()
            try:
                done = pynbd("map", "--trace", uri)
            finally:
                server.terminate()
            served = server.communicate(timeout=20)[1]
    assert done.returncode == 0
    told, heard = (re.findall(r"[<>] .*", text) for text in (done.stderr, served))
    assert told == heard
    assert "> NBD_CMD_BLOCK_STATUS cookie 0x1 offset 0 length 1048576" in told
