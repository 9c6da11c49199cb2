"""pynbd info of generated chains: what qemu-img info says, key by key."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner

from interop import generator, peers
from interop.generator import Chain, ChainPlan
from pynbd.cli.info import info


def without_ours(images: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Less the one key that QEMU does not have, which every usable bitmap has."""
    for image in images:
        for bitmap in image.get("format-specific", {}).get("data", {}).get("bitmaps", []):
            assert 0 <= bitmap.pop("dirty-bytes") <= image["virtual-size"]
    return images


@pytest.mark.parametrize("plan", generator.plan(), ids=lambda plan: plan.id)
def test_chain(plan: ChainPlan, built_chain: Callable[[ChainPlan], Chain]) -> None:
    peers.require("qemu-img", "qemu-io")
    top = str(built_chain(plan).top)
    said = CliRunner().invoke(info, ["--json", "--backing-chain", top])
    assert (said.exit_code, said.stderr) == (0, "")
    expected = peers.run("qemu-img", "info", "--output=json", "--backing-chain", top).stdout
    assert without_ours(json.loads(said.stdout)) == json.loads(expected)
