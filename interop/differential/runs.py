"""One image from its making to the last comparison, read by both servers or written by both."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from interop import peers
from interop.conftest import serving
from interop.differential.answering import Connection, Gone
from interop.differential.asking import READING, READING_AHEAD, WRITING, Form, Plan
from interop.differential.comparing import Findings, Pair
from interop.differential.differences import REFUSED_HERE, SECTOR, SIZE, STRICTER, Facts
from interop.differential.images import Subject
from interop.soak import verdict
from tests.conformance.client import Mode


def read(subject: Subject, folder: Path, requests: int, seed: int, findings: Findings) -> None:
    """Ask so many requests of an image that nobody writes, in all modes; and of its snapshot.

    ``findings`` is what they come to, however far it was.
    """
    image = made(subject, folder / "images")
    shown = [exposed(subject)]
    if subject.snapshot:
        shown.append(["-A", "-l", f"snapshot.name={subject.snapshot}"])
    for options in shown:
        options = ["-r", "-f", subject.format, *options]
        with ExitStack() as stack:
            sockets = both_serving(subject, image, options, stack, findings)
            if sockets:
                read_served(subject, sockets, options, findings, requests // len(shown), seed)
    findings.counts["images"] += 1


def both_serving(
    subject: Subject, image: Path, options: Sequence[str], stack: ExitStack, findings: Findings
) -> tuple[Path, Path] | None:
    """The sockets of both servers; None where a damaged image is refused."""
    refusing, sockets = list[str](), list[Path]()
    for name, server in SERVERS.items():
        try:
            sockets.append(stack.enter_context(server(image, *options)))
        except AssertionError:
            if not subject.damaged:
                raise
            refusing.append(name)
    if not refusing:
        return sockets[0], sockets[1]
    if refusing == ["pynbd"] and subject.name in REFUSED_HERE:
        findings.rules[STRICTER] += 1
    elif refusing != list(SERVERS):
        findings.differs(f"refused by {refusing[0]} only")
    findings.counts[f"images refused by {' and '.join(refusing)}"] += 1
    return None


def read_served(
    subject: Subject,
    sockets: tuple[Path, Path],
    options: Sequence[str],
    findings: Findings,
    requests: int,
    seed: int,
) -> None:
    contexts = contexts_of(subject, options)
    parts = [(mode, READING, requests // len(Mode)) for mode in Mode]
    for mode, kinds, count in *parts, (Mode.EXTENDED, READING_AHEAD, requests // 25):
        try:
            with pair(subject, sockets, mode, contexts, findings) as both:
                form = form_of(subject, both.facts.size, contexts)
                plan = Plan(form, mode, kinds, f"{seed} {subject} {' '.join(options)}")
                for batch in plan.batches(count):
                    # What qemu-nbd drops with a connection should be one request.
                    for asks in [[ask] for ask in batch] if subject.damaged else [batch]:
                        both.exchange(asks)
                if kinds is READING and mode is Mode.EXTENDED and not subject.damaged:
                    both.all_of_it()
        except Gone as gone:
            # What is damaged, or read ahead, may end qemu-nbd.
            if gone.args == sockets[:1] or not (subject.damaged or kinds is READING_AHEAD):
                raise
            findings.counts["images that end qemu-nbd"] += 1
            break


def write(subject: Subject, folder: Path, requests: int, seed: int, findings: Findings) -> None:
    """Write two images that are alike, ask for what there is meanwhile, look at both afterwards."""
    ours, theirs = (made(subject, folder / whose) for whose in ("ours", "theirs"))
    options = ["-f", subject.format, *exposed(subject)]
    contexts = contexts_of(subject, options)
    for detecting in ("off", "unmap"):
        changing = [*options, "--discard=unmap", f"--detect-zeroes={detecting}"]
        how = {"writable": True, "detecting": detecting == "unmap"}
        with ExitStack() as stack:
            sockets = (
                stack.enter_context(by_pynbd(ours, *changing)),
                stack.enter_context(by_qemu_nbd(theirs, *changing)),
            )
            for mode in Mode:
                with pair(subject, sockets, mode, contexts, findings, **how) as both:
                    form = form_of(subject, both.facts.size, contexts)
                    plan = Plan(form, mode, WRITING, f"{seed} {subject} {detecting}")
                    for batch in plan.batches(requests // (2 * len(Mode))):
                        both.exchange(batch)
                    if mode is Mode.EXTENDED:
                        both.all_of_it()
    afterwards(subject, ours, theirs, options, findings)
    findings.counts["images"] += 1


def made(subject: Subject, folder: Path) -> Path:
    """Make an image. What the host has allocated without writing it becomes holes: the kernel says
    of it now that it is data, now that it is none, by what it has in memory.
    """
    folder.mkdir()
    image = subject.make(folder)
    for file in [path for path in folder.rglob("*") if path.is_file()]:
        copy = file.with_name("copy")
        subprocess.run(["cp", "--sparse=auto", file, copy], check=True)
        copy.rename(file)
    return image


def afterwards(
    subject: Subject, ours: Path, theirs: Path, options: Sequence[str], findings: Findings
) -> None:
    """Both checks find nothing in either image, and qemu-nbd tells the same of both."""
    if subject.format == "qcow2":
        for image in ours, theirs:
            verdict.checked(image)
    contexts = contexts_of(subject, options)
    with ExitStack() as stack:
        sockets = [
            stack.enter_context(by_qemu_nbd(image, "-r", *options)) for image in (ours, theirs)
        ]
        served = sockets[0], sockets[1]
        with pair(subject, served, Mode.EXTENDED, contexts, findings, writable=True) as both:
            both.all_of_it()


def form_of(subject: Subject, size: int, contexts: tuple[str, ...]) -> Form:
    hot = 8 * subject.cluster_size if subject.damaged else 0
    return Form(size, subject.cluster_size, subject.subcluster_size, contexts, hot)


def exposed(subject: Subject) -> list[str]:
    return ["-A", *(f"--bitmap={name}" for name in subject.bitmaps)]


def contexts_of(subject: Subject, options: Sequence[str]) -> tuple[str, ...]:
    bitmaps = [name for name in subject.bitmaps if f"--bitmap={name}" in options]
    bitmaps = [f"qemu:dirty-bitmap:{name}" for name in bitmaps]
    return "base:allocation", "qemu:allocation-depth", *bitmaps


@contextmanager
def by_pynbd(image: Path, *options: str) -> Iterator[Path]:
    """``pynbd serve``; the socket. It may complain of damage, but not fall over it."""
    with serving(image, *options, says=r"(?s)(?!.*Traceback).*") as uri:
        yield Path(parse_qs(urlsplit(uri).query)["socket"][0])


@contextmanager
def by_qemu_nbd(image: Path, *options: str) -> Iterator[Path]:
    """qemu-nbd, which looks for data files from where it runs; the socket. It listens before it
    opens the image.
    """
    with peers.socket_path() as path:
        line = ["env", "-C", str(image.parent), *peers.command("qemu-nbd")]
        line += ["--persistent", "--shared=0", f"--socket={path}", *options, image.name]
        with peers.listening(line, path):
            try:
                Connection(path, Mode.SIMPLE, ()).close()
            except Gone as error:
                raise AssertionError(f"{line} does not serve") from error
            yield path


SERVERS = {"pynbd": by_pynbd, "qemu-nbd": by_qemu_nbd}


@contextmanager
def pair(
    subject: Subject,
    sockets: tuple[Path, Path],
    mode: Mode,
    contexts: Sequence[str],
    findings: Findings,
    *,
    writable: bool = False,
    detecting: bool = False,
) -> Iterator[Pair]:
    """A connection to each server; what their exports are is compared, too."""
    ours, theirs = (Connection(path, mode, contexts) for path in sockets)
    if ours.size != theirs.size:
        assert abs(ours.size - theirs.size) < SECTOR
        findings.rules[SIZE] += 1
    if ours.flags != theirs.flags:
        findings.differs(f"{mode.value}: flags {ours.flags:#x} here, {theirs.flags:#x} there")
    size = min(ours.size, theirs.size)
    facts = Facts(
        size,
        subject.cluster_size,
        subject.subcluster_size,
        writable=writable,
        damaged=subject.damaged,
        shared=bool(subject.snapshot),
        compressed=subject.compressed,
        version_2=subject.version_2,
        raw=subject.format == "raw",
        detecting=detecting,
    )
    with closing(Pair(ours, theirs, facts, findings)) as both:
        yield both
