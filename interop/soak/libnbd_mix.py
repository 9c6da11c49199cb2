"""A second client, and a second judge, that shares nothing with pynbd: libnbd, run by nbdsh.

Several connections, 16 requests in flight. Those that are in flight never overlap, unless both
read: what the disk holds is known to the byte, and a read is held against it as it is.

It runs in the peers' own Python: ``judge(uri, content, cluster, requests, seed, trims)``.
"""

from __future__ import annotations

import json
import random
import select
import sys
from pathlib import Path
from typing import Any

import nbd

IN_FLIGHT = 16
CONNECTIONS = 4
KINDS = {"read": 30, "write": 40, "zeroes": 12, "trim": 10, "flush": 6}


class Judge:
    def __init__(self, uri: str, path: Path, cluster: int, seed: str, *, trims: bool) -> None:
        self.path, self.cluster = path, cluster
        self.content = bytearray(path.read_bytes())
        self.random = random.Random(seed)
        self.kinds = {kind: weight for kind, weight in KINDS.items() if trims or kind != "trim"}
        self.handles = [self.connected(uri) for _ in range(CONNECTIONS)]
        # (handle, cookie, kind, offset, end, data or buffer, what a read has to give)
        self.under_way: list[tuple[Any, ...]] = []
        self.changes: list[tuple[str, int, int, bool]] = []
        self.counts = dict.fromkeys(self.kinds, 0)

    def connected(self, uri: str) -> Any:
        handle = nbd.NBD()
        handle.connect_uri(uri)
        assert handle.get_size() == len(self.content)
        return handle

    def run(self, requests: int) -> None:
        while requests or self.under_way:
            while requests and len(self.under_way) < IN_FLIGHT:
                requests -= 1
                self.ask()
            self.answers()
        for offset in range(0, len(self.content), 1 << 20):
            end = min(offset + (1 << 20), len(self.content))
            got = self.handles[0].pread(end - offset, offset)
            self.agree(offset, end, got, self.content[offset:end])
        for handle in self.handles:
            handle.shutdown()
        self.path.write_bytes(self.content)
        json.dump({"counts": self.counts, "changes": self.changes}, sys.stdout)

    def ask(self) -> None:
        kind = self.random.choices(list(self.kinds), list(self.kinds.values()))[0]
        handle, flags = self.random.choice(self.handles), 0
        offset, end = self.range(self.cluster if kind == "trim" else 1)
        if kind == "flush" or self.meets(offset, end, kind):
            cookie = handle.aio_flush()
            self.under_way.append((handle, cookie, "flush", 0, 0, None, None))
            return
        length, expected = end - offset, None
        if self.random.random() < 0.04 and kind != "read":
            flags |= nbd.CMD_FLAG_FUA
        if kind == "read":
            data: Any = nbd.Buffer(length)
            expected = bytes(self.content[offset:end])
            cookie = handle.aio_pread(data, offset)
        elif kind == "write":
            data = nbd.Buffer.from_bytearray(bytearray(self.random.randbytes(length)))
            cookie = handle.aio_pwrite(data, offset, flags=flags)
        elif kind == "zeroes":
            data = self.random.random() < 0.3
            flags |= nbd.CMD_FLAG_NO_HOLE if data else 0
            cookie = handle.aio_zero(length, offset, flags=flags)
        else:
            data, cookie = None, handle.aio_trim(length, offset, flags=flags)
        self.under_way.append((handle, cookie, kind, offset, end, data, expected))

    def range(self, unit: int) -> tuple[int, int]:
        size = len(self.content)
        longest = self.random.choice([512, 4096, 2 * self.cluster, max(64 << 10, self.cluster)])
        length = max(unit, self.random.randrange(1, min(longest, size // 2)) // unit * unit)
        offset = self.random.randrange(size - length + 1) // unit * unit
        if self.random.random() < 0.3 and offset >= length:
            offset = offset // self.cluster * self.cluster
        return offset, offset + length

    def meets(self, offset: int, end: int, kind: str) -> bool:
        return any(
            other[3] < end and offset < other[4] and not kind == other[2] == "read"
            for other in self.under_way
        )

    def answers(self) -> None:
        """Wait until something is answered."""
        poll = select.poll()
        by_descriptor = {}
        for handle in self.handles:
            if handle.aio_in_flight() or handle.aio_get_direction() & nbd.AIO_DIRECTION_WRITE:
                direction = handle.aio_get_direction()
                events = select.POLLIN if direction & nbd.AIO_DIRECTION_READ else 0
                events |= select.POLLOUT if direction & nbd.AIO_DIRECTION_WRITE else 0
                poll.register(handle.aio_get_fd(), events)
                by_descriptor[handle.aio_get_fd()] = handle
        for descriptor, events in poll.poll(20000) if by_descriptor else ():
            handle = by_descriptor[descriptor]
            if events & select.POLLIN and handle.aio_get_direction() & nbd.AIO_DIRECTION_READ:
                handle.aio_notify_read()
            elif events & select.POLLOUT:
                handle.aio_notify_write()
        done = [asked for asked in self.under_way if asked[0].aio_command_completed(asked[1])]
        for asked in done:
            self.under_way.remove(asked)
            self.answered(*asked[2:])

    def answered(self, kind: str, offset: int, end: int, data: Any, expected: Any) -> None:
        self.counts[kind] += 1
        if kind == "read":
            self.agree(offset, end, data.to_bytearray(), expected)
        elif kind != "flush":
            self.content[offset:end] = (
                data.to_bytearray() if kind == "write" else bytes(end - offset)
            )
            self.changes.append((kind, offset, end - offset, kind == "zeroes" and data))

    def agree(self, offset: int, end: int, got: bytes, expected: bytes) -> None:
        if got != expected:
            wrong = next(at for at in range(end - offset) if got[at] != expected[at])
            raise AssertionError(
                f"a read of {end - offset} bytes at {offset}: at {offset + wrong} is"
                f" {got[wrong : wrong + 16].hex()}, expected {expected[wrong : wrong + 16].hex()}"
            )


if __name__ == "__main__":
    uri, path, cluster, requests, seed, trims = sys.argv[1:]
    judge = Judge(uri, Path(path), int(cluster), seed, trims=trims == "yes")
    judge.run(int(requests))
