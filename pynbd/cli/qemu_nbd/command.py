"""``pynbd-qemu-nbd``: takes the place of qemu-nbd wherever a program or a person starts that.

Its options, their letters and values, what it does when clients leave, and its exit statuses are
those of qemu-nbd 10 (``docs/tools/qemu-nbd.rst`` in QEMU, and what it was seen to do). It prints
nothing on standard output. Errors are told in pynbd's words.

What is imported here is light: with --fork the process is doubled before there are threads, and
callers ask for --version before they do anything.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import click

from pynbd.cli import complaints
from pynbd.cli.activation import activated_sockets
from pynbd.cli.completion import file_names
from pynbd.cli.imports import imported
from pynbd.cli.logs import configure
from pynbd.cli.objects import Objects
from pynbd.cli.qemu_nbd.daemon import Daemon
from pynbd.cli.qemu_nbd.getopt import GetoptCommand
from pynbd.cli.qemu_nbd.kernel import disconnect
from pynbd.cli.qemu_nbd.options import QemuNbdOptions
from pynbd.cli.signals import ENDING, watch
from pynbd.cli.texts import export_text
from pynbd.protocol.values import DEFAULT_PORT

NAME = "pynbd-qemu-nbd"
# Callers read a version there and ask it for features, as ovirt-imageio does.
_LIKE = "10.0.0"

_INTEGER = re.compile(r"\s*\+?(?:0[xX]([0-9a-fA-F]+)|0([0-7]*)|([1-9][0-9]*))", re.ASCII)


def _integer(high: int) -> Callable[[str | int], int]:
    """The type of an option: 0 to ``high``, as strtol(3) reads it, also in octal (0...) and
    hexadecimal (0x...).
    """

    def convert(value: str | int) -> int:
        match = _INTEGER.fullmatch(str(value))
        if match:
            sixteen, eight, ten = match.groups()
            base, digits = (16, sixteen) if sixteen else (10, ten) if ten else (8, eight or "0")
            if (number := int(digits, base)) <= high:
                return number
        raise click.BadParameter(f"{value!r} is not a whole number, 0 to {high}")

    return convert


class _QemuNbd(GetoptCommand):
    once: ClassVar = (
        frozenset({"-n", "--nocache", "--cache"}),
        frozenset({"--aio"}),
        frozenset({"--discard"}),
    )


@click.command(
    cls=_QemuNbd,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""\b
Exit status:
  0  it has served, or with --fork it serves now
  1  an error, which is one line on standard error

\b
Where it is not like qemu-nbd:
  --tls-authz needs clients with certificates that are verified: it is refused without.
  Of priorities there are NORMAL and @SYSTEM; tls-creds-anon and encrypted secrets are refused.
  A raw image has one writer, and nobody reads beside it, as with qcow2.
  -k does not take a socket away from a server that listens there.
  --fork ends with 0 when the server runs, also after a warning.

\b
Examples:
  pynbd-qemu-nbd -k /run/disk.sock -f qcow2 disk.qcow2
  pynbd-qemu-nbd -k /run/disk.sock -t -e 8 -r -B backup-1 disk.qcow2
  pynbd-qemu-nbd --fork --pid-file /run/disk.pid -k /run/disk.sock -r disk.qcow2
  pynbd-qemu-nbd -L -k /run/disk.sock
  nbdinfo -- [ pynbd-qemu-nbd -r -f qcow2 disk.qcow2 ]
""",
)
@click.argument("file", nargs=-1, metavar="FILE", shell_complete=file_names)
@click.option(
    "-k", "--socket", metavar="PATH", help="Listen on a unix socket; the path is absolute."
)
@click.option(
    "-b",
    "--bind",
    metavar="ADDR",
    help="Listen on this address (default: 0.0.0.0, which is every address of this machine).",
)
@click.option(
    "-p",
    "--port",
    metavar="PORT",
    type=_integer(65535),
    help=f"Listen on this port (default: {DEFAULT_PORT}).",
)
@click.option("--selinux-label", metavar="LABEL", help="The SELinux label of the unix socket.")
@click.option(
    "-x",
    "--export-name",
    metavar="NAME",
    callback=export_text,
    help="The name of the export (default: empty).",
)
@click.option(
    "-D",
    "--description",
    metavar="TEXT",
    callback=export_text,
    help="What clients are told of it (default: nothing).",
)
@click.option(
    "-e",
    "--shared",
    metavar="NUM",
    type=_integer(2**31 - 1),
    default=1,
    show_default=True,
    help="Clients at a time; more wait. 0 is any number.",
)
@click.option("-t", "--persistent", is_flag=True, help="Go on when the last client has left.")
@click.option(
    "--handshake-limit",
    metavar="SECONDS",
    type=_integer(2**31 - 1),
    default=10,
    show_default=True,
    help="Time for the negotiation; 0 is no limit.",
)
@click.option(
    "-f",
    "--format",
    metavar="FORMAT",
    help="raw or qcow2 (default: told by the first bytes; a raw image is then kept from being made"
    " to look like another format).",
)
@click.option(
    "--image-opts", is_flag=True, help="FILE is a list of options: driver=...,file.filename=..."
)
@click.option("-r", "--read-only", is_flag=True, help="Refuse writes.")
@click.option(
    "-o",
    "--offset",
    metavar="OFFSET",
    type=_integer(2**63 - 1),
    default=0,
    show_default=True,
    help="The disk begins at this byte of the image.",
)
@click.option(
    "-l",
    "--load-snapshot",
    metavar="SNAPSHOT",
    help="Serve an internal snapshot, read-only: NAME, ID, or snapshot.id=ID,snapshot.name=NAME.",
)
@click.option(
    "-s",
    "--snapshot",
    is_flag=True,
    help="Write to a temporary file, which is gone in the end; FILE is only read.",
)
@click.option("-A", "--allocation-depth", is_flag=True, help="Offer qemu:allocation-depth.")
@click.option(
    "-B",
    "--bitmap",
    metavar="NAME",
    multiple=True,
    help="Offer qemu:dirty-bitmap:NAME; repeatable.",
)
@click.option("-n", "--nocache", is_flag=True, help="The same as --cache=none.")
@click.option(
    "--cache",
    type=click.Choice(["none", "off", "writeback", "writethrough", "directsync", "unsafe"]),
    help="How files are cached: none and directsync go past the page cache, with writethrough and"
    " directsync each write is on stable storage before it is answered, unsafe ignores flushes"
    " (default: writeback).",
)
@click.option(
    "--aio",
    type=click.Choice(["threads", "native", "io_uring"]),
    help="Taken, without effect; native needs --cache=none or directsync (default: threads).",
)
@click.option(
    "--discard",
    type=click.Choice(["ignore", "off", "unmap", "on"]),
    help="Whether what clients discard is given back to the file system (default: ignore).",
)
@click.option(
    "--detect-zeroes",
    type=click.Choice(["off", "on", "unmap"]),
    default="off",
    show_default=True,
    help="What becomes of writes of nothing but zeroes: on marks them as zeroes, unmap makes holes"
    " of them, and needs --discard=unmap.",
)
@click.option("--fork", is_flag=True, help="Go on in the background, once clients can connect.")
@click.option(
    "--pid-file",
    metavar="PATH",
    help="Write the ID of the process there, once clients can connect.",
)
@click.option(
    "-L", "--list", is_flag=True, help="List what the server at -k, or -b and -p, exports."
)
@click.option(
    "-c",
    "--connect",
    metavar="DEV",
    help="Let FILE be the kernel's block device DEV (/dev/nbd0); in the background, without -v.",
)
@click.option("-d", "--disconnect", is_flag=True, help="FILE is a device: undo --connect.")
@click.option(
    "--object",
    metavar="TYPE,...",
    multiple=True,
    help="What the options of TLS name by its ID: tls-creds-x509, tls-creds-psk, secret,"
    " authz-simple, authz-list, authz-list-file; repeatable.",
)
@click.option(
    "--tls-creds", metavar="ID", help="Require TLS with these credentials; with -L, use them."
)
@click.option(
    "--tls-hostname",
    metavar="NAME",
    help="With -L: whom the certificate of the server has to be for (default: -b ADDR).",
)
@click.option(
    "--tls-authz",
    metavar="ID",
    help="The authz-* object that says by the name in his certificate who may come in.",
)
@click.option(
    "-v", "--verbose", is_flag=True, help="Tell of clients that come and go, and of those cut off."
)
@click.option(
    "-T",
    "--trace",
    metavar="PATTERN",
    help="nbd_* or *: tell every message of the protocol, on standard error. Other patterns have"
    " no effect.",
)
@click.version_option(
    None, "-V", "--version", package_name="pynbd", message=f"qemu-nbd {_LIKE} (pynbd %(version)s)"
)
def qemu_nbd(**options: Any) -> None:  # the options are QemuNbdOptions, name by name
    """Serve FILE over NBD as qemu-nbd does: to one client, until it leaves.

    FILE is an image, or json:{...}. It listens on every address of this machine, unless -k or -b
    says otherwise. TERM, INT, QUIT and HUP end it.
    """
    wanted = QemuNbdOptions(**options)
    sockets = activated_sockets()
    wanted.check(activated=bool(sockets))
    objects = Objects(wanted.object)
    configure(verbose=wanted.verbose, trace=_traces(wanted.trace), log_format="text", program=NAME)
    if wanted.list or wanted.disconnect:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
        if wanted.disconnect:
            disconnect(wanted.image)
        else:
            imported("pynbd.cli.qemu_nbd.listing").print_exports(wanted, objects)
        return
    daemon = None
    if wanted.fork or (wanted.connect is not None and not wanted.verbose):
        daemon = Daemon.fork(keep_errors=wanted.verbose)
    watch()
    serving = imported("pynbd.cli.qemu_nbd.serving")
    serving.run(wanted, objects, sockets, daemon, trace=_traces(wanted.trace))


def _traces(pattern: str | None) -> bool:
    """Whether ``--trace [enable=]PATTERN[,events=...][,file=...]`` means what passes here."""
    first = (pattern or "").partition(",")[0].removeprefix("enable=")
    return first.startswith("nbd") or fnmatchcase("nbd", first)


def main() -> None:
    """Run the command line of this process."""
    complaints.run(qemu_nbd, NAME, usage_status=1)
