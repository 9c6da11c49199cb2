"""The generator keeps its word: every legal pair is met, and the images are what was planned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from interop import generator, peers
from interop.generator import UNITS, ChainPlan
from interop.pairs import LEGAL, coverage, every_pair, pairs

PLANS = generator.plan()


def test_every_legal_pair_is_met() -> None:
    met = set().union(*(pairs(plan.choice) for plan in PLANS))
    print(coverage(plan.choice for plan in PLANS))
    assert len(PLANS) >= 100
    assert met == set(LEGAL)
    assert len(LEGAL) < len(set(every_pair()))


def test_a_seed_decides_everything() -> None:
    assert generator.plan(7, 3) == generator.plan(7, 3) != generator.plan(8, 3)


@pytest.mark.parametrize("plan", PLANS[::10], ids=lambda plan: plan.id)
def test_images_are_as_planned(plan: ChainPlan, tmp_path: Path) -> None:
    """By qemu-img info, layer by layer."""
    peers.require("qemu-img", "qemu-io")
    chain = generator.build(plan, tmp_path)
    info = ["info", "--backing-chain", "--output=json", str(chain.top)]
    found = json.loads(peers.run("qemu-img", *info).stdout)
    assert len(found) == int(plan.choice["layers"])
    for layer, image in zip(reversed(plan.layers), found, strict=True):
        assert (image["format"], image["virtual-size"]) == (layer.format, layer.size)
        if layer.format == "qcow2":
            said, choice = image["format-specific"]["data"], layer.choice
            assert image["cluster-size"] == UNITS[choice["cluster"]]
            assert said["compat"] == {"v2": "0.10", "v3": "1.1"}[choice["version"]]
            assert said.get("extended-l2", False) == (choice["extended_l2"] == "on")
            assert said.get("data-file-raw", None) == (
                None if choice["data_file"] == "none" else choice["data_file"] == "data_file_raw"
            )
            assert said["compression-type"] == choice["compression"].replace("none", "zlib")
            assert len(image.get("snapshots", [])) == layer.snapshot
            assert {
                bitmap["name"]: bitmap["granularity"] for bitmap in said.get("bitmaps", [])
            } == {bitmap.name: bitmap.granularity for bitmap in layer.bitmaps}
            check = peers.run("qemu-img", "check", "--output=json", image["filename"]).stdout
            compressed = json.loads(check).get("compressed-clusters", 0)
            assert (compressed > 0) == (choice["compression"] != "none")
