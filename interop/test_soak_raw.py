"""The mix of requests to a raw image, of which every byte can be discarded."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from interop import samples
from interop.conftest import serving
from interop.soak.mix import Form, Mix
from interop.soak.shadow import Shadow

SIZE = (3 << 20) + 777
REQUESTS = 2500


@pytest.mark.parametrize("options", ["", "--detect-zeroes=unmap"])
def test_raw(options: str, tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    content = samples.sparse_file(image, SIZE)
    mix = Mix(Shadow(np.frombuffer(bytearray(content), np.uint8)), Form(SIZE, 4096, 1))
    with serving(image, "-f", "raw", *options.split()) as uri:
        asyncio.run(run(mix, uri))
    assert np.array_equal(np.fromfile(image, np.uint8), mix.shadow.content)


async def run(mix: Mix, uri: str) -> None:
    await mix.run(uri, REQUESTS, "raw")
    await mix.read_all(uri)
