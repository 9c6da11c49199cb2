"""pynbd as its users start it: a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from interop import generated, peers
from interop.generator import Chain, ChainPlan

PynbdServe = Callable[..., str]


@contextmanager
def serving(
    image: str | Path, *args: str, says: str = "", under: Sequence[str] = ()
) -> Iterator[str]:
    """``pynbd serve`` on a unix socket of its own, started by the command ``under``; the URI that
    it prints.

    At the end SIGTERM: it must leave with status 0, and what it has said on standard error must
    match ``says``, which is nothing for most.
    """
    with peers.socket_path() as socket, tempfile.TemporaryFile() as errors:
        program = [*under, sys.executable, "-m", "pynbd"]
        line = [*program, "serve", "-k", str(socket), *args, str(image)]
        with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            assert process.stdout is not None
            try:
                uri = process.stdout.readline().strip()
                if uri:
                    yield uri
            except Exception as error:
                errors.seek(0)
                error.add_note(f"{line} said: {errors.read().decode()}")
                raise
            finally:
                process.terminate()
                try:
                    status = process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    raise
        errors.seek(0)
        said = errors.read().decode()
        assert uri, f"{line} does not start: {said}"
        assert status == 0, said
        assert re.fullmatch(says, said), said


@pytest.fixture
def pynbd_serve() -> Iterator[PynbdServe]:
    """``pynbd_serve(image, *args) -> uri``; the servers end with the test."""
    with ExitStack() as stack:
        yield lambda image, *args, **rest: stack.enter_context(serving(image, *args, **rest))


@pytest.fixture(scope="session")
def built_chain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[ChainPlan], Chain]:
    """``built_chain(plan)``: a generated chain to be looked at, built once in a run."""
    folder = generated.shared_folder(tmp_path_factory)
    return lambda plan: generated.built(plan, folder)
