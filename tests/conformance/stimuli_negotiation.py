"""Malformed client flags and options: rows H, O, S and M."""

from __future__ import annotations

from tests.conformance.client import Option, client_flags, option
from tests.conformance.malformed import Stimulus

_FLAGS = client_flags()

STIMULI = [
    Stimulus("H12", "wrong option magic", _FLAGS, option(Option.LIST, magic=b"IHAVEOPS")),
]
