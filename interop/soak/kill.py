"""kill -9 of a busy server, many times on the same image: `main` for long, `kill_rounds` for some.

The kernel keeps what the server's calls have written: what is lost is what it had in memory, at any
instruction. After each round the image keeps the promises of a crash (`interop.soak.judging`), and
qemu-io opens it for writing; the next round goes on with it.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import tempfile
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random

from interop import peers
from interop.soak.cells import CELL, Request
from interop.soak.crashes import folders, quiet, timed
from interop.soak.judging import Before, Judge, check_by_peer
from interop.soak.plans import PLANS, Plan, build, requests
from interop.soak.recording import Timeline
from pynbd.client.connection import Client

ROUNDS = 50
LONGEST = 0.5  # seconds that a server lives under load
CLIENTS = 2
IN_FLIGHT = 8  # of each client
MAIN_PLANS = ("subclusters-shared", "lazy-shared", "growing-again")


async def kill_rounds(plan: Plan, seed: int, rounds: int) -> int:
    """Rounds on one image; how many requests were answered. Raises `judging.Broken`."""
    rng = Random(seed)
    answered = 0
    with folders() as (folder, judged):
        image = build(plan, folder)
        for path in folder.glob("base.*"):
            (judged / path.name).write_bytes(path.read_bytes())
        before = await Before.of(plan, image)
        for _ in range(rounds):
            timeline = Timeline()
            asked = await _round(plan, image, rng, timeline)
            answered += sum(request.end is not None for request in asked)
            judge = Judge(plan, judged, before, asked)
            judge.advance(timeline.now + 1)
            contents = {name: (folder / name).read_bytes() for name in plan.files}
            await judge.judge(contents, peer=True)
            peers.run("qemu-io", "-f", plan.format, "-c", "write 0 512", judge.image, cwd=judged)
            if plan.format == "qcow2":
                check_by_peer(judge.image, leaks=True)
            before = await Before.of(plan, image)
    return answered


async def _round(plan: Plan, image: Path, rng: Random, timeline: Timeline) -> list[Request]:
    """Serve, ask, and kill; what was asked."""
    asked: list[Request] = []
    with peers.socket_path() as socket, tempfile.TemporaryFile() as says:
        line = [sys.executable, "-m", "pynbd", "serve", "-k", str(socket), str(image)]
        server = await asyncio.create_subprocess_exec(
            *line, stdin=DEVNULL, stdout=PIPE, stderr=says
        )
        assert server.stdout is not None
        clients: list[Client] = []
        guests: list[asyncio.Task[None]] = []
        try:
            uri = (await server.stdout.readline()).decode().strip()
            clients += [await Client.open(uri) for _ in range(CLIENTS)]
            flow = requests(plan, rng, sys.maxsize, 0)
            guests += [
                asyncio.create_task(_guest(client, flow, asked, timeline))
                for client in clients * IN_FLIGHT
            ]
            await asyncio.sleep(rng.uniform(0.05, LONGEST))
        finally:
            server.kill()
            await server.wait()
        await asyncio.gather(*guests)
        for client in clients:
            await client.close()
        says.seek(0)
        assert server.returncode == -signal.SIGKILL, says.read().decode()
    return asked


async def _guest(
    client: Client, flow: Iterator[list[Request]], asked: list[Request], timeline: Timeline
) -> None:
    """Ask one after the other, until the server is gone."""
    with suppress(ConnectionError):
        for group in flow:
            asked += group
            await timed(group, timeline, _ask(client, group))


async def _ask(client: Client, group: Sequence[Request]) -> None:
    head = group[0]
    offset, length = head.first * CELL, (head.last - head.first) * CELL
    if head.kind == "write":
        for answer in [
            client.start_write(request.first * CELL, request.payload.tobytes(), fua=head.fua)
            for request in group
            if request.payload is not None
        ]:
            await answer
    elif head.kind == "zeroes":
        await client.write_zeroes(offset, length, no_hole=head.number % 3 == 0, fua=head.fua)
    elif head.kind == "discard":
        await client.trim(offset, length, fua=head.fua)
    else:
        await client.flush()


def main(rounds: int = ROUNDS, seed: int = 1) -> int:
    """Rounds on each of some images; prints what was done. How many requests were answered."""
    quiet()
    answered = 0
    for plan in (plan for plan in PLANS if plan.name in MAIN_PLANS):
        answered += asyncio.run(kill_rounds(plan, seed, rounds))
    print(f"{rounds} times kill -9 on each of {len(MAIN_PLANS)} images: {answered} requests")
    return answered


if __name__ == "__main__":
    main()
