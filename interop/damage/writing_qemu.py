"""The same damaged image written to by qemu-nbd, with the same requests: whether that makes the
damage worse, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from interop import peers
from interop.damage.generator import Case
from interop.damage.writing import Writing, done
from interop.damage.writing_model import Model
from tests.conformance.client import Disconnected, Mode, Peer


def written(cases: Iterable[Case]) -> Iterator[tuple[Case, str]]:
    """What is worse after each; nothing if the image is refused, or as good as before."""
    with TemporaryDirectory(prefix="pynbd-damage-") as name:
        writing = Writing(Path(name))
        for case in cases:
            yield case, "; ".join(_worse(writing, case))


def _worse(writing: Writing, case: Case) -> list[str]:
    path, _ = writing.placed(case)
    before = writing.seen(path)
    if before.guest is None:
        return []
    model = Model(before.guest)
    with peers.socket_path() as socket:
        # It looks for data files from where it works.
        program = ["env", "-C", str(path.parent), *peers.command("qemu-nbd")]
        line = [*program, "-t", "-e", "0", "--discard=unmap", "-f", "qcow2", "-k", str(socket)]
        # It refuses the image, or listens and refuses it then.
        with (
            suppress(AssertionError, Disconnected, TimeoutError),
            peers.listening([*line, path.name], socket),
            Peer(socket) as peer,
        ):
            for _ in done(peer, case, path, model, [Mode.SIMPLE]):
                pass
    return writing.worse(path, before, model, strictly=False)
