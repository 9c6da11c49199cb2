"""Options that `copy` and `compare` share."""

from __future__ import annotations

from pynbd.cli.copy import copy
from pynbd.client.ends import CONNECTIONS
from pynbd.client.workers import REQUEST_SIZE, REQUESTS


def test_defaults() -> None:
    defaults = copy.make_context("copy", ["a", "b"]).params
    told = {name: defaults[name] for name in ("connections", "requests", "request_size")}
    assert told == {
        "connections": CONNECTIONS,
        "requests": REQUESTS,
        "request_size": REQUEST_SIZE,
    }
