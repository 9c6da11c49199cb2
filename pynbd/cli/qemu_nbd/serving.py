"""What `pynbd-qemu-nbd` serves, once its arguments are known to make sense."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import click

from pynbd.block.cache_modes import Cache
from pynbd.block.image_options import JSON_PREFIX, parse_image_opts
from pynbd.block.node import BlockNode
from pynbd.cli import qemu_tls
from pynbd.cli.loops import FASTEST, LOOPS
from pynbd.cli.objects import Objects
from pynbd.cli.qemu_nbd.daemon import Daemon, write_pid_file
from pynbd.cli.qemu_nbd.kernel import KernelDevice
from pynbd.cli.qemu_nbd.options import QemuNbdOptions
from pynbd.cli.running import listen_on, run_server
from pynbd.cli.signals import watch
from pynbd.errors import PynbdError
from pynbd.server.export import Export
from pynbd.server.limits import Limits
from pynbd.server.listening import Listening
from pynbd.server.offers import offered_contexts
from pynbd.server.serving import open_to_serve
from pynbd.server.zeroes import DetectZeroes

if TYPE_CHECKING:  # it takes libraries that are not wanted without TLS
    from pynbd.server.tls import Tls

log = logging.getLogger("pynbd")

_SOCKET_LABEL = "/proc/thread-self/attr/sockcreate"  # attr(5) of SELinux


def run(
    wanted: QemuNbdOptions,
    objects: Objects,
    sockets: Sequence[socket.socket],
    daemon: Daemon | None,
    *,
    trace: bool,
) -> None:
    """Serve until a signal, or the last client, ends it."""
    loop = LOOPS[FASTEST]
    if wanted.connect is None:
        tls = None
        if wanted.tls_creds is not None:
            tls = qemu_tls.server_tls(objects, wanted.tls_creds, wanted.tls_authz)
        loop(_serve(wanted, sockets, daemon, None, tls, trace=trace))
        return
    with closing(KernelDevice(wanted.connect)) as device:
        attachment = _Attachment(wanted, device, daemon)
        loop(_serve(wanted, sockets, daemon, attachment, None, trace=trace))
        attachment.end()


async def _serve(
    wanted: QemuNbdOptions,
    sockets: Sequence[socket.socket],
    daemon: Daemon | None,
    attachment: _Attachment | None,
    tls: Tls | None,
    *,
    trace: bool,
) -> None:
    async with await _open(wanted) as node:
        contexts = offered_contexts(
            node,
            depth=wanted.allocation_depth,
            bitmaps=wanted.bitmap[::-1],  # the order in which qemu-nbd lists them
        )
        export = Export(
            wanted.export_name,
            node,
            description=wanted.description,
            contexts=contexts,
            multi_conn=wanted.shared != 1,
            unmap=wanted.unmap,
            reserve=False,  # in qemu-nbd NO_HOLE keeps the space that there is
            detect_zeroes=DetectZeroes(wanted.detect_zeroes),
        )

        def listen() -> Listening:
            with _socket_label(wanted.selinux_label):
                return listen_on(sockets, wanted.socket_path, wanted.host, wanted.tcp_port)

        def ready(_listening: Listening) -> None:
            if wanted.pid_file is not None:
                write_pid_file(wanted.pid_file)
            os.chdir("/")  # no file system is kept from being unmounted
            if attachment is not None:
                attachment.start()
            elif daemon is not None:
                daemon.ready()

        await run_server(
            export,
            listen,
            ready,
            max_clients=wanted.shared,
            until_idle=not wanted.persistent,
            limits=Limits(handshake_seconds=wanted.handshake_limit),
            tls=tls,
            thrown_away=wanted.snapshot,
            trace=trace,
        )


async def _open(wanted: QemuNbdOptions) -> BlockNode:
    """The image, for writing where that was not ruled out."""
    image: str | Mapping[str, object] = wanted.image.removeprefix("file:")  # as QEMU names files
    if wanted.image_opts:
        image = parse_image_opts(wanted.image)

    node = await open_to_serve(
        image,
        read_only=wanted.reads_only,
        overlay=wanted.snapshot,
        format=wanted.format,
        snapshot=wanted.load_snapshot,
        probe_backing=True,
        offset=wanted.offset,
        whole_sectors=True,
        cache=Cache(wanted.cache_mode),
    )
    writes_it = not (wanted.reads_only or wanted.snapshot)
    guessed = wanted.format is None and not wanted.image_opts and writes_it
    if guessed and node.format == "raw" and not wanted.image.startswith(JSON_PREFIX):
        log.warning(
            "%s: its format was not given, and guessed to be raw: no write may make it look like"
            " another format (-f raw lifts that)",
            node.name,
        )
    return node


class _Attachment(threading.Thread):
    """``--connect``: the kernel as the client, in a thread that waits for its end."""

    def __init__(self, wanted: QemuNbdOptions, device: KernelDevice, daemon: Daemon | None) -> None:
        super().__init__(name="kernel", daemon=True)
        self._wanted = wanted
        self._device = device
        self._daemon = daemon
        self._failure: PynbdError | None = None

    def run(self) -> None:
        path = self._wanted.socket_path
        assert path is not None
        try:
            self._device.attach(path, self._attached)
        except PynbdError as error:
            self._failure = error
        stop = watch().stop
        assert stop is not None
        stop()

    def end(self) -> None:
        """After the server has ended. Raises `PynbdError` if the device failed."""
        if self.is_alive():
            self.join()
        if self._failure is not None:
            raise self._failure

    def _attached(self) -> None:
        if self._daemon is not None:
            self._daemon.ready()
        else:
            wanted = self._wanted
            text = f"NBD device {wanted.connect} is now connected to {wanted.image}"
            click.echo(text, err=True)


@contextmanager
def _socket_label(label: str | None) -> Iterator[None]:
    """Sockets that this thread makes have an SELinux label. Raises `PynbdError`."""
    if label is None:
        yield
        return
    try:
        _write_label(label)
    except OSError as error:
        raise PynbdError(f"--selinux-label: {label!r}: {error.strerror}") from None
    try:
        yield
    finally:
        _write_label("")


def _write_label(label: str) -> None:
    fd = os.open(_SOCKET_LABEL, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.write(fd, label.encode() + b"\0" if label else b"")  # nothing: the default again
    finally:
        os.close(fd)
