"""An export as a block device of Linux: the ioctls of ``/dev/nbdN`` (``linux/nbd.h``).

The kernel gets a socket on which everything is negotiated, and speaks the transmission phase there:
requests and simple replies. NBD_DO_IT returns when the device is disconnected.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Callable, Generator
from contextlib import closing, suppress

import click

from pynbd.errors import PynbdError
from pynbd.protocol.handshake import Read, Session, Step, Write
from pynbd.protocol.handshake_client import enter
from pynbd.protocol.values import TransmissionFlag

_SET_SOCK, _SET_BLKSIZE = 0xAB00, 0xAB01
_DO_IT, _CLEAR_SOCK, _CLEAR_QUE = 0xAB03, 0xAB04, 0xAB05
_SET_SIZE_BLOCKS, _DISCONNECT, _SET_FLAGS = 0xAB07, 0xAB08, 0xAB0A
_BLKROSET = 0x125D

_SECTOR = 512
_MAX_SECTORS = 2**31 - 1  # what fcntl.ioctl takes


class KernelDevice:
    """An NBD device that is open. Raises `PynbdError` where there is none."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise PynbdError(
                f"{path}: cannot be opened: {error.strerror} (does the kernel have nbd?)"
            ) from None

    def close(self) -> None:
        os.close(self._fd)

    def attach(self, socket_path: str, attached: Callable[[], object]) -> None:
        """Be the default export of the server at ``socket_path``, until it is disconnected.

        ``attached`` is called when the device is usable. Blocks. Raises `PynbdError`.
        """
        with closing(socket.socket(socket.AF_UNIX)) as sock:
            try:
                sock.connect(socket_path)
                export = _negotiated(sock, enter("", structured=False, extended=False)).export
                if export.size // _SECTOR > _MAX_SECTORS:
                    raise PynbdError(f"{self.path}: {export.size} bytes are too many for it")
                self._ioctl(_SET_SOCK, sock.fileno())
                self._ioctl(_SET_BLKSIZE, _SECTOR)
                self._ioctl(_SET_SIZE_BLOCKS, export.size // _SECTOR)
                self._ioctl(_SET_FLAGS, int(export.flags))
                if TransmissionFlag.READ_ONLY in export.flags:
                    fcntl.ioctl(self._fd, _BLKROSET, struct.pack("i", 1))
                attached()
                with suppress(BrokenPipeError):  # the server has ended first
                    self._ioctl(_DO_IT)
            except (OSError, EOFError) as error:
                raise PynbdError(f"{self.path}: {error}") from None
            finally:
                self._release()

    def disconnect(self) -> None:
        """End what another process attached. Raises `OSError` where it is no NBD device."""
        self._ioctl(_CLEAR_QUE)
        self._ioctl(_DISCONNECT)
        self._ioctl(_CLEAR_SOCK)

    def _release(self) -> None:
        for request in (_CLEAR_QUE, _CLEAR_SOCK):
            with suppress(OSError):
                self._ioctl(request)

    def _ioctl(self, request: int, argument: int = 0) -> None:
        fcntl.ioctl(self._fd, request, argument)


def disconnect(path: str) -> None:
    """``--disconnect``: prints that it is done, as qemu-nbd does. Raises `PynbdError`."""
    with closing(KernelDevice(path)) as device:
        try:
            device.disconnect()
        except OSError as error:
            raise PynbdError(f"{path}: it is no NBD device: {error.strerror}") from None
    click.echo(f"{path} disconnected")


def _negotiated(sock: socket.socket, steps: Generator[Step, bytes | None, Session]) -> Session:
    answer: bytes | None = None
    while True:
        try:
            step = steps.send(answer)
        except StopIteration as end:
            session: Session = end.value
            return session
        answer = None
        if isinstance(step, Read):
            answer = sock.recv(step.size, socket.MSG_WAITALL)
            if len(answer) < step.size:
                raise EOFError("the server closed the connection")
        else:
            assert isinstance(step, Write)
            sock.sendall(step.data)
