"""Malformed requests: rows C, B, W and P."""

from __future__ import annotations

from tests.conformance.malformed import Stimulus

STIMULI: list[Stimulus] = []
