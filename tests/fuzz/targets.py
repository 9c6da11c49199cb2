"""What is fuzzed: every module of this folder named for a part of pynbd, ``<part>_<what>.py``.

A target has

* a docstring: which bytes, which section of which specification, what is allowed, and why;
* ``ALLOWED``, the exceptions that are an answer; any other is a defect;
* ``seeds()``, inputs that are valid or nearly so, from which mutation begins deep;
* ``one_input(data)``, which asserts what has to hold whatever the bytes are;

and, if need be, ``MAX_LEN``, the bytes of the longest input; ``DICTIONARY``, words that no mutation
finds by chance; and ``SMOKE``, how many inputs the smoke test mutates, for one that is slow.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

PARTS = ("protocol", "names", "block")


@dataclass(frozen=True, slots=True)
class Target:
    """One of the modules."""

    name: str
    allowed: tuple[type[BaseException], ...]
    seeds: Callable[[], Iterable[bytes]]
    one_input: Callable[[bytes], None]
    max_len: int
    dictionary: tuple[bytes, ...]
    smoke: int

    def run(self, data: bytes) -> None:
        """One input. Raises what is not allowed; what is, is said in one line."""
        try:
            self.one_input(data)
        except self.allowed as error:
            lines = str(error).splitlines()
        else:
            return
        assert len(lines) < 2, f"an answer in {len(lines)} lines: {lines}"


def names() -> list[str]:
    """All targets that there are."""
    files = Path(__file__).parent.glob("*_*.py")
    return sorted(file.stem for file in files if file.stem.split("_")[0] in PARTS)


def load(name: str) -> Target:
    module = importlib.import_module(f"tests.fuzz.{name}")
    return Target(
        name,
        module.ALLOWED,
        module.seeds,
        module.one_input,
        getattr(module, "MAX_LEN", 4096),
        getattr(module, "DICTIONARY", ()),
        getattr(module, "SMOKE", 400),
    )


def mutated(rng: random.Random, seeds: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    """One of the seeds after one to four changes: what libFuzzer does, without coverage."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.randint(1, 4)):
        at, end = sorted((rng.randint(0, len(data)), rng.randint(0, len(data))))
        match rng.randrange(7):
            case 0 if data:
                data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
            case 1 if data:
                data[min(at, len(data) - 1)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 2:  # a number at an edge, of any usual width
                width = rng.choice((1, 2, 4, 8))
                edge = (1 << rng.randrange(8 * width + 1)) + rng.randint(-1, 1)
                data[at : at + width] = (edge % (1 << 8 * width)).to_bytes(width, "big")
            case 3:
                del data[at : min(end, at + rng.choice((1, 4, 16, 1 << 20)))]
            case 4:
                data[at:at] = data[at : min(end, at + 64)]
            case 5:
                other = rng.choice(seeds)
                data[at:] = other[rng.randint(0, len(other)) :]
            case _:
                data[at:at] = rng.choice(words) if words else rng.randbytes(rng.randint(1, 8))
    return bytes(data)
