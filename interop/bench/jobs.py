"""What a client does with a server, and the one figure that comes of it.

The clients are fio's nbd engine, nbdcopy, nbdinfo and nbdsh, other people's programs all.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from interop import peers
from interop.bench import images, tables
from interop.bench.busy import keep_busy
from interop.bench.servers import Server

RAMP = 0.3  # seconds, of long jobs, before fio begins to count: caches fill
FILTERED = 400  # requests for block status
FILTERED_LENGTH = 1 << 29  # one L2 table: 1,024 extents in each bitmap
BUSY_CONNECTIONS = 500

Measure = Callable[[Server, float], float]


@dataclass(frozen=True)
class Job:
    """``measure(server, seconds)`` gives a figure in ``unit``, after about so many seconds."""

    unit: str
    measure: Measure
    lower_is_better: bool = False

    def ratio(self, ours: float, theirs: float) -> float:
        """Above 1 if the first of two figures is the better one."""
        return theirs / ours if self.lower_is_better else ours / theirs


def run_fio(server: Server, *options: str, seconds: float) -> list[dict[str, Any]]:
    """fio's jobs against a server; what its JSON report says of each."""
    line = ["--ioengine=nbd", f"--uri={server.uri}", *options]
    said = peers.run("fio", "--output-format=json", *line, timeout=60 + 4 * seconds).stdout
    jobs: list[dict[str, Any]] = json.loads(said[said.index("{") :])["jobs"]
    return jobs


def shape(mode: str, size: str, depth: int) -> list[str]:
    return [f"--rw={mode}", f"--bs={size}", f"--iodepth={depth}"]


def lasting(seconds: float) -> list[str]:
    """As many requests as there is time for, once the ramp is over."""
    runtime = ["--time_based", f"--runtime={round(seconds * 1000)}ms"]
    ramp = min(RAMP, seconds / 2)
    return [*runtime, f"--ramp_time={round(ramp * 1000)}ms", "--norandommap", "--randrepeat=1"]


def rated(mode: str, size: str, arguments: Callable[[float], list[str]]) -> Job:
    """A job of fio whose figure is its rate: requests where they are small, else bytes."""
    direction = "write" if "write" in mode else "read"
    small = size == "4k"

    def measure(server: Server, seconds: float) -> float:
        (job,) = run_fio(server, "--name=job", *arguments(seconds), seconds=seconds)
        done = job[direction]
        return float(done["iops"] if small else done["bw_bytes"] / 1e6)

    return Job("requests/s" if small else "MB/s", measure)


def steady(mode: str, size: str, depth: int, whole: int = images.SIZE, connections: int = 1) -> Job:
    """Requests for the given time, all over a disk of ``whole`` bytes."""
    several = [f"--numjobs={connections}", "--group_reporting"]
    what = [*shape(mode, size, depth), f"--size={whole}", *several]
    return rated(mode, size, lambda seconds: [*what, *lasting(seconds)])


def filling(mode: str, size: str, depth: int, amount: int, whole: int = images.SIZE) -> Job:
    """``amount`` bytes written to a disk that has nothing yet, each block once."""
    what = [*shape(mode, size, depth), f"--size={whole}", f"--io_size={amount}", "--randrepeat=1"]
    return rated(mode, size, lambda seconds: what)


def beside_flushes() -> Job:
    """The 99th percentile of random reads while another client writes and flushes steadily."""
    size = f"--size={images.SIZE}"

    def measure(server: Server, seconds: float) -> float:
        read = ["--name=read", *shape("randread", "4k", 1), size, *lasting(seconds)]
        rate = ["--rate_iops=100", "--fsync=1"]
        write = ["--name=write", *shape("randwrite", "4k", 1), size, *rate, *lasting(seconds)]
        jobs = run_fio(server, *read, *write, seconds=seconds)
        return float(jobs[0]["read"]["clat_ns"]["percentile"]["99.000000"]) / 1e3

    return Job("us, p99", measure, lower_is_better=True)


def copying(connections: int) -> Job:
    """nbdcopy of the whole disk to null:, holes or not."""
    line = [f"--connections={connections}", "--no-extents"]

    def measure(server: Server, seconds: float) -> float:
        taken = mean_time(lambda: peers.run("nbdcopy", *line, server.uri, "null:"), seconds)
        return images.SIZE / 1e6 / taken

    return Job("MB/s", measure)


def map_time(context: str) -> Job:
    """One run of nbdinfo over the whole disk, all its output included."""

    def measure(server: Server, seconds: float) -> float:
        return mean_time(lambda: map_whole(server, context), seconds)

    return Job("seconds", measure, lower_is_better=True)


def map_cpu(context: str) -> Job:
    """What one such run costs the server."""

    def measure(server: Server, seconds: float) -> float:
        return mean_time(lambda: map_whole(server, context), seconds, server.cpu)

    return Job("cpu s", measure, lower_is_better=True)


def map_whole(server: Server, context: str) -> None:
    line = [*peers.command("nbdinfo"), f"--map={context}", server.uri]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL, timeout=60)


def mean_time(
    work: Callable[[], object], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> float:
    """What a run of ``work`` takes by the clock, when it is done over and over for ``seconds``."""
    end = time.perf_counter() + seconds
    start = clock()
    count = 0
    while count == 0 or time.perf_counter() < end:
        work()
        count += 1
    return (clock() - start) / count


ASK = f"""
contexts = ["base:allocation", "qemu:allocation-depth"]
contexts += ["qemu:dirty-bitmap:" + name for name in {tables.BITMAPS!r}]
for name in contexts:
    h.add_meta_context(name)
h.connect_uri(URI)
for i in range({FILTERED}):
    offset = i * {FILTERED_LENGTH}
    h.block_status_filter({FILTERED_LENGTH}, offset, contexts[:COUNT], lambda *answer: 0)
"""


def filtered() -> Job:
    """How many times the processor time of one context all eight take."""

    def cpu(server: Server, count: int) -> float:
        start = server.cpu()
        peers.nbdsh(f"URI, COUNT = {server.uri!r}, {count}\n{ASK}")
        return server.cpu() - start

    return Job("times", lambda server, seconds: cpu(server, 8) / cpu(server, 1))


def startup() -> Job:
    return Job("seconds", lambda server, seconds: server.started, lower_is_better=True)


def memory(job: Job) -> Job:
    """The most that was resident while another job ran."""

    def measure(server: Server, seconds: float) -> float:
        job.measure(server, seconds)
        return server.peak() / 2**20

    return Job("MiB", measure, lower_is_better=True)


def crowded(connections: int = BUSY_CONNECTIONS, whole: int = images.SIZE) -> Job:
    """Many connections, each with a read of 4 KiB always in flight."""

    def measure(server: Server, seconds: float) -> float:
        return keep_busy(server.address, connections, whole, seconds)

    return Job("requests/s", measure)
