"""pynbd map of generated chains: nbdinfo's map of the same image behind qemu-nbd, to the byte."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from click.testing import CliRunner

from interop import generator, peers
from interop.generator import Chain, ChainPlan
from pynbd.cli.map import map as map_command


def pynbd_map(*args: str) -> str:
    said = CliRunner().invoke(map_command, args)
    assert (said.exit_code, said.stderr) == (0, "")
    return said.stdout


def side_by_side(maps: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The maps of single contexts, cut at each other's edges."""
    edges = sorted({row["offset"] for rows in maps.values() for row in rows})
    last = next(iter(maps.values()))[-1]
    size = last["offset"] + last["length"]
    found = [
        {"offset": start, "length": end - start}
        for start, end in zip(edges, [*edges[1:], size], strict=True)
    ]
    for context, rows in maps.items():
        left = iter(rows)
        row = next(left)
        for both in found:
            if both["offset"] == row["offset"] + row["length"]:
                row = next(left)
            both[context] = {"type": row["type"], "description": row["description"]}
    return found


@pytest.mark.parametrize("plan", generator.plan(), ids=lambda plan: plan.id)
def test_chain(plan: ChainPlan, built_chain: Callable[[ChainPlan], Chain]) -> None:
    peers.require("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo")
    chain = built_chain(plan)
    top = str(chain.top)
    contexts = ["base:allocation", "qemu:allocation-depth"]
    contexts += [f"qemu:dirty-bitmap:{name}" for name in chain.bitmaps]
    exposed = ["-A", *(f"--bitmap={name}" for name in chain.bitmaps)]
    maps = {}
    with peers.qemu_nbd(top, "-r", "-f", "qcow2", *exposed) as uri:

        def nbdinfo(context: str, *args: str) -> str:
            return peers.run("nbdinfo", f"--map={context}", *args, uri).stdout

        for context in contexts:
            assert pynbd_map("-c", context, top) == nbdinfo(context)
            expected = nbdinfo(context, "--json")
            assert pynbd_map("-c", context, "--json", top) == expected
            maps[context] = json.loads(expected)
        for shape in (["--totals"], ["--totals", "--json"]):
            assert pynbd_map(*shape, top) == nbdinfo("base:allocation", *shape)
    together = json.loads(pynbd_map("--json", *with_option(contexts), top))
    assert together == side_by_side(maps)


def with_option(contexts: Sequence[str]) -> list[str]:
    return [word for context in contexts for word in ("--context", context)]
