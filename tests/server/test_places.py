"""Where connections come from, and how many may."""

from __future__ import annotations

import resource
import socket
from types import SimpleNamespace
from typing import Any

import pytest

from pynbd.server.places import RESERVE, Places, origin


@pytest.mark.parametrize(
    "family, address, where",
    [
        (socket.AF_INET, ("192.0.2.1", 5), "192.0.2.1"),
        (socket.AF_INET6, ("2001:db8:1:2:3:4:5:6", 5, 0, 0), "2001:db8:1:2::/64"),
        (socket.AF_INET6, ("2001:db8:1:2::", 6, 0, 0), "2001:db8:1:2::/64"),
        (socket.AF_INET6, ("fe80::1%eth0", 5, 0, 2), "fe80::/64"),
        (socket.AF_INET6, ("::ffff:192.0.2.1", 5, 0, 0), "192.0.2.1"),
        (socket.AF_UNIX, "", None),
    ],
)
def test_origins(family: int, address: Any, where: str | None) -> None:
    assert origin(SimpleNamespace(family=family), address) == where  # type: ignore[arg-type]


def test_each_address_has_so_many() -> None:
    places = Places(0, per_address=2)
    with socket.socket() as sock:
        for where in ("a", "a", "b"):
            assert places.allows(where)
            places.take(sock, where)
        assert not places.allows("a")
        assert places.allows("b")
        assert places.allows(None)
        places.leave("a")
        assert places.allows("a")
        assert not places.full


def test_the_last_descriptors_are_kept() -> None:
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    places = Places(0, 0)

    def take(descriptor: int) -> bool:
        return places.take(SimpleNamespace(fileno=lambda: descriptor), None)  # type: ignore[arg-type]

    assert take(most - RESERVE - 1)
    assert not places.full
    assert not take(most - RESERVE)
    assert places.full
    places.leave(None)
    assert not places.full
