"""What pynbd-qemu-nbd takes together, and what not; as qemu-nbd, whose refusals are compared with
ours in ``interop/test_qemu_nbd_side_by_side.py``.
"""

from __future__ import annotations

import pytest

from pynbd.cli.qemu_nbd.command import qemu_nbd
from pynbd.cli.qemu_nbd.options import QemuNbdOptions
from pynbd.errors import PynbdError, UsageError


def options(*args: str) -> QemuNbdOptions:
    """What click makes of a command line."""
    context = qemu_nbd.make_context("test", list(args))
    return QemuNbdOptions(**context.params)


def refusal(*args: str, activated: bool = False) -> PynbdError:
    with pytest.raises(PynbdError) as caught:
        options(*args).check(activated=activated)
    return caught.value


def test_defaults() -> None:
    wanted = options("disk")
    wanted.check(activated=False)
    assert (wanted.host, wanted.tcp_port, wanted.socket_path) == ("0.0.0.0", 10809, None)
    assert (wanted.shared, wanted.persistent, wanted.handshake_limit) == (1, False, 10)
    assert (wanted.cache_mode, wanted.unmap, wanted.reads_only) == ("writeback", False, False)


@pytest.mark.parametrize(
    "args, mode",
    [
        (["-n"], "none"),
        (["--nocache"], "none"),
        (["--cache=off"], "none"),
        (["--cache=directsync"], "directsync"),
    ],
)
def test_cache_modes(args: list[str], mode: str) -> None:
    assert options(*args, "disk").cache_mode == mode


def test_a_kernel_device_has_a_socket_of_its_own() -> None:
    assert options("-c", "/dev/nbd7", "disk").socket_path == "/var/lock/qemu-nbd-nbd7"
    assert options("-c", "/dev/nbd7", "-k", "/s", "disk").socket_path == "/s"


def test_a_socket_wins_over_an_address() -> None:
    wanted = options("-k", "/s", "-b", "127.0.0.1", "-p", "1", "disk")
    wanted.check(activated=False)
    assert wanted.socket_path == "/s"


LIST_CLASHES = ["-x e", "-D t", "-o 1", "-c /dev/nbd0", "-d", "-f raw", "-l s", "-B b", "-A"]
LIST_CLASHES += ["--aio=threads", "--discard=off", "--cache=none", "-n", "--fork"]


@pytest.mark.parametrize("clash", LIST_CLASHES)
def test_list_excludes(clash: str) -> None:
    error = refusal("-L", *clash.split())
    assert isinstance(error, UsageError)
    assert str(error).startswith("--list: it does not go with --")


@pytest.mark.parametrize("others", ["-t -e 3 -v -r -s", "--pid-file=p --handshake-limit=1"])
def test_list_takes(others: str) -> None:
    options("-L", *others.split()).check(activated=False)


@pytest.mark.parametrize(
    "args, says",
    [
        ("", "one FILE is expected, not 0"),
        ("a b", "one FILE is expected, not 2"),
        ("-L disk", "--list: it takes no FILE"),
        ("-k s disk", "--socket: 's': an absolute path of at most 107 bytes is expected"),
        ("--selinux-label=x disk", "--selinux-label: it is for --socket and --connect"),
        ("--image-opts -f raw disk", "--image-opts excludes --format: driver= is the format"),
        ("--aio=native disk", "--aio=native needs --cache=none or --cache=directsync"),
        ("--detect-zeroes=unmap disk", "--detect-zeroes=unmap needs --discard=unmap"),
        ("-o 1 -l s disk", "--offset excludes --load-snapshot"),
    ],
)
def test_no_sense(args: str, says: str) -> None:
    error = refusal(*args.split())
    assert isinstance(error, UsageError)
    assert str(error) == says


@pytest.mark.parametrize("bitmap", ["-o 1", "-l s"])
def test_bitmaps_of_a_part(bitmap: str) -> None:
    assert str(refusal("-B", "b", *bitmap.split(), "disk")).startswith("--bitmap: ")


@pytest.mark.parametrize(
    "args, says",
    [
        ("--tls-hostname h disk", "--tls-hostname: it needs --tls-creds"),
        ("--tls-authz a disk", "--tls-authz: it needs --tls-creds"),
        ("-L --tls-hostname h", "--tls-hostname: it needs --tls-creds"),
        ("-L --tls-authz a", "--tls-authz: it needs --tls-creds"),
        ("-L --tls-creds t --tls-authz a", "--tls-authz: it is for a server, not for --list"),
        ("--tls-creds t --tls-hostname h disk", "--tls-hostname: it is for --list"),
        ("--tls-creds t -c /dev/nbd0 disk", "--tls-creds: the kernel has no TLS for --connect"),
    ],
)
def test_tls(args: str, says: str) -> None:
    error = refusal(*args.split())
    assert isinstance(error, UsageError)
    assert str(error) == says


@pytest.mark.parametrize(
    "args", ["--tls-creds t --tls-authz a disk", "-L --tls-creds t --tls-hostname h"]
)
def test_tls_of_each_end(args: str) -> None:
    options(*args.split()).check(activated=False)


@pytest.mark.parametrize("args", ["-s -r", "-l s --detect-zeroes=on", "-r --detect-zeroes=on"])
def test_without_effect_on_what_is_read_only(args: str) -> None:
    options(*args.split(), "disk").check(activated=False)


@pytest.mark.parametrize("option", ["-c/dev/nbd0", "-k/s", "-b::1", "-p1", "--selinux-label=x"])
def test_activated(option: str) -> None:
    error = refusal(option, "disk", activated=True)
    assert str(error).endswith(": not with socket activation (LISTEN_FDS)")


def test_list_activated() -> None:
    assert str(refusal("-L", activated=True)).startswith("--list: not with socket activation")
