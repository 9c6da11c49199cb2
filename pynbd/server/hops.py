"""How the writes of a batch go to the pool."""

from __future__ import annotations

from pynbd.protocol.transmission import Request

# Writes that share one hop, in bytes: longer batches are spread over the threads.
WRITE_HOP = 1 << 18


def write_hops(writes: list[Request]) -> list[tuple[list[Request], int]]:
    """The writes that go there together, and how many bytes that is."""
    total = sum([request.length for request in writes])
    if total <= WRITE_HOP:
        return [(writes, total)]
    hops: list[tuple[list[Request], int]] = []
    hop: list[Request] = []
    held = 0
    for request in writes:
        if hop and held + request.length > WRITE_HOP:
            hops.append((hop, held))
            hop, held = [], 0
        hop.append(request)
        held += request.length
    return [*hops, (hop, held)]
