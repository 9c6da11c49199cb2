"""Hostile clients, one coroutine a kind, with nothing but a socket and the bytes of the protocol.

Each goes on until it is cancelled; whoever is thrown out comes again, as such clients do.
"""

from __future__ import annotations

import asyncio
import random
import select
import socket
import struct
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress

READ, WRITE, DISC, FLUSH, _TRIM, CACHE, _ZEROES, BLOCK_STATUS = range(8)
UNKNOWN_OPTION, LIST = 0x7FFF, 3
LONGEST = 32 << 20
# Seconds between two bytes of those who are slow.
_SLOWLY = 1.0
_GREETING = struct.Struct(">8s8sH")
_OPTION = struct.Struct(">8sII")
_REQUEST = struct.Struct(">IHHQQI")
_HELLO = struct.pack(">I", 3)
_MIB = bytes(1 << 20)


def option(number: int, length: int) -> bytes:
    return _OPTION.pack(b"IHAVEOPT", number, length)


def request(command: int, offset: int, length: int, cookie: int = 1) -> bytes:
    return _REQUEST.pack(0x25609513, 0, command, cookie, offset, length)


class Line:
    """A connection to the server. ``source``: the address that it comes from, if that is TCP's."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def open(cls, address: str | tuple[str, int], source: str) -> Line:
        sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        sock.setblocking(False)
        try:
            if not isinstance(address, str):
                sock.bind((source, 0))
            while True:
                try:
                    await asyncio.get_running_loop().sock_connect(sock, address)
                except BlockingIOError:  # the backlog of a unix socket is full
                    await asyncio.sleep(0.05)
                else:
                    return cls(sock)
        except BaseException:
            sock.close()
            raise

    async def say(self, data: bytes) -> None:
        await self._loop.sock_sendall(self._sock, data)

    async def hear(self, most: int = 1 << 18) -> bytes:
        """What has come. Raises `EOFError` at the end."""
        data = await self._loop.sock_recv(self._sock, most)
        if not data:
            raise EOFError
        return data

    async def hear_all(self) -> None:
        while True:
            await self.hear()

    async def exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            data += await self.hear(count - len(data))
        return data

    async def negotiate(self) -> None:
        """As far as transmission with simple replies."""
        await self.exactly(_GREETING.size)
        await self.say(_HELLO + option(1, 0))
        await self.exactly(10)

    async def thrown_out(self) -> None:
        """Raises `EOFError` once the server has ended it, which also a socket tells that is never
        read from.
        """
        ended = select.poll()
        ended.register(self._sock, 0)  # POLLHUP and POLLERR, which nobody has to ask for
        while not ended.poll(0):  # noqa: ASYNC110 (no loop tells of these two alone)
            await asyncio.sleep(0.2)
        raise EOFError

    def half_close(self) -> None:
        self._sock.shutdown(socket.SHUT_WR)

    def close(self, *, reset: bool = False) -> None:
        if reset and self._sock.family == socket.AF_INET:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._sock.close()


async def silent(line: Line, _chance: random.Random) -> None:
    """Says nothing at all."""
    await line.hear_all()


async def idle(line: Line, _chance: random.Random) -> None:
    """Negotiates, and asks for nothing."""
    await line.negotiate()
    await line.hear_all()


async def never_reads(line: Line, chance: random.Random) -> None:
    """Asks for more than it could ever hold, and takes none of it."""
    await line.negotiate()
    await line.say(request(READ, 0, LONGEST, chance.getrandbits(64)) * 500)
    await line.thrown_out()


async def takes_a_byte_a_second(line: Line, _chance: random.Random) -> None:
    await line.negotiate()
    await line.say(request(READ, 0, LONGEST) * 20)
    ending = asyncio.create_task(line.thrown_out())
    try:
        while not ending.done():
            await line.hear(1)
            await asyncio.wait([ending], timeout=_SLOWLY)
        await ending
    finally:
        ending.cancel()


async def negotiates_slowly(line: Line, _chance: random.Random) -> None:
    for byte in _HELLO + option(UNKNOWN_OPTION, LONGEST) + _MIB:
        await line.say(bytes([byte]))
        await asyncio.sleep(_SLOWLY)


async def asks_slowly(line: Line, _chance: random.Random) -> None:
    """One byte of a request at a time."""
    await line.negotiate()
    for byte in request(FLUSH, 0, 0) * 10:
        await line.say(bytes([byte]))
        await asyncio.sleep(_SLOWLY)


async def writes_slowly(line: Line, _chance: random.Random) -> None:
    """Nearly all of a payload, and then a byte at a time."""
    await line.negotiate()
    await line.say(request(WRITE, 0, LONGEST) + _MIB * 31)
    while True:
        await line.say(b"\0")
        await asyncio.sleep(_SLOWLY)


async def talks_nonsense(line: Line, chance: random.Random) -> None:
    if chance.random() < 0.5:
        await line.negotiate()
    await line.say(chance.randbytes(chance.randrange(1, 2000)))
    await line.hear_all()


async def half_closes(line: Line, _chance: random.Random) -> None:
    """Nobody can tell whether it still listens: it does not."""
    await line.negotiate()
    await line.say(request(READ, 0, LONGEST) * 20)
    line.half_close()
    await line.thrown_out()


async def leaves_its_replies(line: Line, _chance: random.Random) -> None:
    await line.negotiate()
    await line.say(request(READ, 0, LONGEST) * 4 + request(DISC, 0, 0))
    await line.thrown_out()


async def haggles_for_ever(line: Line, chance: random.Random) -> None:
    """Options without end, short ones or the longest."""
    await line.say(_HELLO)
    if chance.random() < 0.5:
        while True:
            await line.say(option(UNKNOWN_OPTION, LONGEST))
            for _ in range(32):
                await line.say(_MIB)
    listening = asyncio.create_task(line.hear_all())
    try:
        while True:
            await line.say(option(LIST, 0) * 100)
    finally:
        listening.cancel()


async def floods(line: Line, chance: random.Random) -> None:
    """Short requests of all kinds, as fast as they are answered."""
    await line.negotiate()
    listening = asyncio.create_task(line.hear_all())
    commands = (READ, FLUSH, CACHE, BLOCK_STATUS, 99)
    try:
        while True:
            lot = (chance.choice(commands) for _ in range(200))
            await line.say(
                b"".join(
                    request(one, 0, 0)
                    if one == FLUSH
                    else request(one, chance.randrange(1 << 24), 4096)
                    for one in lot
                )
            )
    finally:
        listening.cancel()


async def breaks_off(line: Line, chance: random.Random) -> None:
    """In the middle of anything."""
    await line.negotiate()
    talk = request(READ, 0, 1 << 20) * 3 + request(WRITE, 0, 1 << 20) + _MIB
    await line.say(talk[: chance.randrange(1, len(talk))])
    await asyncio.sleep(chance.random() / 4)


Kind = Callable[[Line, random.Random], Awaitable[None]]
IDLE: tuple[Kind, ...] = (silent, idle)
HOSTILE: tuple[Kind, ...] = (
    never_reads,
    takes_a_byte_a_second,
    negotiates_slowly,
    asks_slowly,
    writes_slowly,
    talks_nonsense,
    half_closes,
    leaves_its_replies,
    haggles_for_ever,
    floods,
    breaks_off,
)


class Crowd:
    """So many of each kind in turn, until it is dispersed.

    ``came`` counts their connections, and ``ended`` those that the server has ended.
    """

    def __init__(self, address: str | tuple[str, int], seed: int) -> None:
        self._address = address
        self._seed = seed
        self._members: list[asyncio.Task[None]] = []
        self.came: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()

    def gather(self, kinds: tuple[Kind, ...], count: int, source: str) -> None:
        for number in range(count):
            kind = kinds[number % len(kinds)]
            chance = random.Random(f"{self._seed} {source} {number}")
            self._members.append(asyncio.create_task(self._be(kind, chance, source)))

    async def _be(self, kind: Kind, chance: random.Random, source: str) -> None:
        while True:
            try:
                line = await Line.open(self._address, source)
            except OSError:  # the server has ended, or will take no more
                await asyncio.sleep(0.2)
                continue
            self.came[kind.__name__] += 1
            try:
                await kind(line, chance)
            except (OSError, EOFError):
                self.ended[kind.__name__] += 1
            finally:
                line.close(reset=chance.random() < 0.5)
            await asyncio.sleep(0.05 + chance.random() / 10)

    async def disperse(self) -> None:
        for member in self._members:
            member.cancel()
        done = await asyncio.gather(*self._members, return_exceptions=True)
        with suppress(asyncio.CancelledError):
            for failure in done:
                if failure and not isinstance(failure, asyncio.CancelledError):
                    raise failure
        self._members.clear()
