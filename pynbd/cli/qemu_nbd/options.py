"""What `pynbd-qemu-nbd` was asked for, and which of it makes sense together, as in qemu-nbd."""

from __future__ import annotations

import os
from dataclasses import dataclass

from pynbd.errors import UsageError
from pynbd.protocol.values import DEFAULT_PORT
from pynbd.server.listening import MAX_SOCKET_PATH


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuNbdOptions:
    """The names are those of the options; None is what was not given."""

    file: tuple[str, ...]
    socket: str | None
    bind: str | None
    port: int | None
    selinux_label: str | None
    export_name: str
    description: str
    shared: int
    persistent: bool
    handshake_limit: int
    list: bool
    connect: str | None
    disconnect: bool
    fork: bool
    pid_file: str | None
    verbose: bool
    trace: str | None
    format: str | None
    image_opts: bool
    read_only: bool
    snapshot: bool
    load_snapshot: str | None
    offset: int
    allocation_depth: bool
    bitmap: tuple[str, ...]
    nocache: bool
    cache: str | None
    aio: str | None
    discard: str | None
    detect_zeroes: str
    object: tuple[str, ...]
    tls_creds: str | None
    tls_hostname: str | None
    tls_authz: str | None

    @property
    def image(self) -> str:
        """The one FILE."""
        return self.file[0]

    @property
    def cache_mode(self) -> str:
        """The cache mode, however it was given."""
        mode = "none" if self.nocache else self.cache or "writeback"
        return "none" if mode == "off" else mode

    @property
    def unmap(self) -> bool:
        """Whether TRIM is more than a word."""
        return self.discard in ("unmap", "on")

    @property
    def reads_only(self) -> bool:
        """Whether writes are refused by what was asked for."""
        return self.read_only or self.load_snapshot is not None

    @property
    def host(self) -> str:
        return "0.0.0.0" if self.bind is None else self.bind

    @property
    def tcp_port(self) -> int:
        return DEFAULT_PORT if self.port is None else self.port

    @property
    def socket_path(self) -> str | None:
        """Where it listens, unless on TCP; a kernel device has a path of its own."""
        if self.socket is None and self.connect is not None:
            return f"/var/lock/qemu-nbd-{os.path.basename(self.connect)}"
        return self.socket

    def check(self, *, activated: bool) -> None:
        """Raise `UsageError` where the options contradict each other, or that it was ``activated``
        with a socket.
        """
        if self.list:
            self._check_list()
        elif len(self.file) != 1:
            what = "device" if self.disconnect else "FILE"
            raise UsageError(f"one {what} is expected, not {len(self.file)}")
        if activated:
            self._check_activated()
        if self.socket is not None:
            length = len(os.fsencode(self.socket))
            if not self.socket.startswith("/") or length > MAX_SOCKET_PATH:
                raise UsageError(
                    f"--socket: {self.socket!r}: an absolute path of at most {MAX_SOCKET_PATH}"
                    " bytes is expected"
                )
        elif self.selinux_label is not None and self.connect is None:
            raise UsageError("--selinux-label: it is for --socket and --connect")
        if self.bind == "":
            raise UsageError("--bind: an address or the name of a host is expected")
        self._check_tls()
        if self.list or self.disconnect:
            return
        self._check_image()

    def _check_list(self) -> None:
        if self.file:
            raise UsageError("--list: it takes no FILE")
        given = {
            "--export-name": self.export_name,
            "--description": self.description,
            "--offset": self.offset,
            "--connect": self.connect,
            "--disconnect": self.disconnect,
            "--format": self.format,
            "--load-snapshot": self.load_snapshot,
            "--bitmap": self.bitmap,
            "--allocation-depth": self.allocation_depth,
            "--aio": self.aio,
            "--discard": self.discard,
            "--cache": self.cache or self.nocache,
            "--fork": self.fork,
        }
        for option, value in given.items():
            if value:
                raise UsageError(f"--list: it does not go with {option}")

    def _check_activated(self) -> None:
        given = {
            "--connect": self.connect,
            "--socket": self.socket,
            "--bind": self.bind,
            "--port": self.port,
            "--selinux-label": self.selinux_label,
            "--list": self.list or None,
        }
        for option, value in given.items():
            if value is not None:
                raise UsageError(f"{option}: not with socket activation (LISTEN_FDS)")

    def _check_tls(self) -> None:
        if self.tls_creds is None:
            for option, value in (
                ("--tls-hostname", self.tls_hostname),
                ("--tls-authz", self.tls_authz),
            ):
                if value is not None:
                    raise UsageError(f"{option}: it needs --tls-creds")
        elif self.connect is not None:
            raise UsageError("--tls-creds: the kernel has no TLS for --connect")
        elif self.list and self.tls_authz is not None:
            raise UsageError("--tls-authz: it is for a server, not for --list")
        elif self.tls_hostname is not None and not self.list:
            raise UsageError("--tls-hostname: it is for --list")

    def _check_image(self) -> None:
        if self.image_opts and self.format is not None:
            raise UsageError("--image-opts excludes --format: driver= is the format")
        if self.aio == "native" and self.cache_mode not in ("none", "directsync"):
            raise UsageError("--aio=native needs --cache=none or --cache=directsync")
        if self.detect_zeroes == "unmap" and not self.unmap:
            raise UsageError("--detect-zeroes=unmap needs --discard=unmap")
        if self.offset and self.load_snapshot is not None:
            raise UsageError("--offset excludes --load-snapshot")
        if self.bitmap and (self.offset or self.load_snapshot is not None):
            other = "--offset" if self.offset else "--load-snapshot"
            raise UsageError(f"--bitmap: bitmaps are of the whole active state; not with {other}")
        if self.snapshot and self.load_snapshot is not None:
            raise UsageError("--snapshot excludes --load-snapshot")
