"""What the options of a node mean: QEMU's `BlockdevOptions`, as far as the drivers are here (pure).

The rules, as QEMU has them (``qapi/block-core.json``, and ``blockdev`` in its documentation):

1. A format (``raw``, ``qcow2``) stands on ``file``, which is another node; ``file`` and
   ``host_device`` open a host file by its ``filename``. Without ``driver`` a node that has a
   ``file`` is a format that is guessed.
2. ``backing``: null, or "" (which is older), is no backing file whatever the image says; options
   take the place of what the image says; absent, the image decides.
3. The cache options of a node hold for what is below it, unless that has its own.
4. An option that nobody knows is refused. Options of QEMU that tune it, and have no meaning here,
   are taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pynbd.block.cache_modes import CacheMode
from pynbd.block.sizes import parse_size
from pynbd.block.window import SECTOR
from pynbd.errors import ImageError, UnsupportedFeature


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_COMMON = _words(
    "driver node-name read-only auto-read-only cache discard detect-zeroes force-share"
)
_PROTOCOL = _words("filename locking aio aio-max-batch drop-cache x-check-cache-dropped")
_TUNING = _words(
    "lazy-refcounts pass-discard-request pass-discard-snapshot pass-discard-other"
    " discard-no-unref overlap-check cache-size l2-cache-size l2-cache-entry-size"
    " refcount-cache-size cache-clean-interval"
)
_OPTIONS = {
    "file": _COMMON | _PROTOCOL,
    "host_device": _COMMON | _PROTOCOL,
    "raw": _COMMON | {"file", "offset", "size", "backing"},
    "qcow2": _COMMON | {"file", "backing", "data-file"} | _TUNING,
    "": _COMMON | {"file", "backing", "data-file", "offset", "size"} | _TUNING,
}
_UNSUPPORTED = _words(
    "blkdebug blklogwrites blkreplay blkverify bochs cloop compress copy-before-write copy-on-read"
    " dmg ftp ftps gluster host_cdrom http https io_uring iscsi luks nbd nfs null-aio null-co"
    " nvme nvme-io_uring parallels preallocate qcow qed quorum rbd replication snapshot-access"
    " ssh throttle vdi vhdx virtio-blk-vfio-pci virtio-blk-vhost-user virtio-blk-vhost-vdpa vmdk"
    " vpc vvfat"
)
_ENCRYPTION = "encrypt"

_YES = frozenset({"on", "yes", "true", "y"})
_NO = frozenset({"off", "no", "false", "n"})


@dataclass(frozen=True, slots=True)
class FileOptions:
    """A host file. ``device``: whether it has to be a block device; None: whatever it is.
    ``locked``: as QEMU locks it, unless ``force_share``.
    """

    filename: str
    cache: CacheMode
    force_share: bool
    device: bool | None = None
    read_only: bool = False
    locked: bool = True


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """An image: a format, on a host file or on another image.

    ``driver`` None is guessed, or for a backing file what the overlay records. ``file`` None is the
    recorded one (backing files only). ``offset`` and ``size`` are those of ``raw``; ``backing`` and
    ``data_file`` None are those that the image names, and with ``no_backing`` there is none.
    """

    driver: str | None
    file: FileOptions | ImageOptions | None
    cache: CacheMode
    force_share: bool
    read_only: bool = False
    offset: int = 0
    size: int | None = None
    backing: ImageOptions | None = None
    no_backing: bool = False
    data_file: FileOptions | None = None

    @property
    def is_window(self) -> bool:
        """Whether it was given an offset or a size."""
        return bool(self.offset) or self.size is not None

    @property
    def file_name(self) -> str:
        """The name of the host file that it is in, "" where that is a recorded one."""
        if isinstance(self.file, ImageOptions):
            return self.file.file_name
        return self.file.filename if self.file else ""

    def refuse_writing(self) -> None:
        """Raise `ImageError` if its options, or those of what it stands on, are against it."""
        node: FileOptions | ImageOptions | None = self
        while node is not None:
            if node.read_only:
                raise ImageError("image option read-only: it is on, and the image is to be written")
            if node.force_share:
                raise ImageError("image option force-share: only what is read can be shared so")
            node = node.file if isinstance(node, ImageOptions) else None


def image_options(
    options: Mapping[str, object], *, cache: CacheMode, force_share: bool
) -> ImageOptions:
    """What the options of the top node mean. Raises `ImageError`, which names the option."""
    node = _Node(options, "")
    if node.driver() in ("file", "host_device"):
        file = node.file(cache, force_share)
        return ImageOptions("raw", file, file.cache, file.force_share)
    return node.image(cache, force_share)


class _Node:
    """The options of one node, and the path to them."""

    def __init__(self, options: Mapping[str, object], path: str) -> None:
        self._options = options
        self._path = path

    def driver(self) -> str:
        """The driver, "" where none is given."""
        driver = self._text("driver", "a driver") or ""
        if driver in _UNSUPPORTED:
            raise UnsupportedFeature(
                f"{self._at('driver')}: the driver {driver!r} is not supported"
            )
        if driver not in _OPTIONS:
            raise self._wrong("driver", f"one of {_listed(set(_OPTIONS) - {''})}")
        return driver

    def file(self, cache: CacheMode, force_share: bool) -> FileOptions:
        """As a host file."""
        driver = self.driver()
        if driver not in ("", "file", "host_device"):
            raise UnsupportedFeature(
                f"{self._at('driver')}: {driver!r} cannot stand here; file and host_device can"
            )
        self._check(driver or "file")
        filename = self._text("filename", "a file name")
        if not filename:
            raise ImageError(f"{self._at('filename')}: a file name is needed")
        return FileOptions(
            filename,
            self._cache(cache),
            self.flag("force-share", force_share),
            driver == "host_device" if driver else None,
            self.flag("read-only"),
            self._options.get("locking") != "off",
        )

    def image(self, cache: CacheMode, force_share: bool, *, recorded: bool = False) -> ImageOptions:
        """As an image; ``recorded``: an overlay records its file."""
        driver = self.driver()
        if not driver and "file" not in self._options and not recorded:
            raise ImageError(f"{self._at('driver')}: driver or file is needed")
        self._check(driver)
        cache, force_share = self._cache(cache), self.flag("force-share", force_share)
        below = self._node("file")
        if below is None and not recorded:
            raise ImageError(f"{self._at('file')}: a node is needed, as file.filename=NAME")
        offset, size = self._size("offset") or 0, self._size("size")
        if size is not None and size % SECTOR:
            raise self._wrong("size", f"a multiple of {SECTOR}")
        backing, no_backing = None, self._options.get("backing", False) in (None, "")
        if not no_backing:
            overriding = self._node("backing")
            if overriding is not None:
                backing = overriding.image(cache, force_share, recorded=True)
        data = self._node("data-file")
        return ImageOptions(
            driver or None,
            None if below is None else below._below(cache, force_share),
            cache,
            force_share,
            self.flag("read-only"),
            offset,
            size,
            backing,
            no_backing,
            None if data is None else data.file(cache, force_share),
        )

    def _below(self, cache: CacheMode, force_share: bool) -> FileOptions | ImageOptions:
        if self.driver() in ("", "file", "host_device"):
            return self.file(cache, force_share)
        return self.image(cache, force_share)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._options.get(name, default)
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value in _YES | _NO:
            return value in _YES
        raise self._wrong(name, "on or off")

    def _check(self, driver: str) -> None:
        """Rule 4."""
        allowed = _OPTIONS[driver]
        for name in self._options:
            if name == _ENCRYPTION:
                raise UnsupportedFeature(f"{self._at(name)}: encryption is not supported")
            if name not in allowed:
                known = f"the driver {driver}" if driver else "an image"
                raise ImageError(
                    f"{self._at(name)}: no option of {known}; allowed: {_listed(allowed)}"
                )
        self._one_of("discard", "ignore off unmap on")
        if self._one_of("detect-zeroes", "off on unmap") not in (None, "off"):
            raise UnsupportedFeature(f"{self._at('detect-zeroes')}: is not supported yet, only off")
        self._one_of("locking", "auto on off")
        self._one_of("aio", "threads native io_uring")
        self.flag("auto-read-only")

    def _cache(self, inherited: CacheMode) -> CacheMode:
        """Rule 3."""
        node = self._node("cache")
        if node is None:
            return inherited
        for name in node._options:
            if name not in ("direct", "no-flush"):
                raise ImageError(f"{node._at(name)}: no option of a cache; direct and no-flush are")
        return inherited._replace(
            direct=node.flag("direct", inherited.direct),
            no_flush=node.flag("no-flush", inherited.no_flush),
        )

    def _node(self, name: str) -> _Node | None:
        value = self._options.get(name)
        if isinstance(value, Mapping):
            return _Node(value, f"{self._path}{name}.")
        if name in self._options:
            raise self._wrong(name, f"options ({name}.NAME=...); there are no nodes to refer to")
        return None

    def _text(self, name: str, what: str) -> str | None:
        value = self._options.get(name)
        if name in self._options and not isinstance(value, str):
            raise self._wrong(name, what)
        return value if isinstance(value, str) else None

    def _one_of(self, name: str, words: str) -> object:
        value = self._options.get(name)
        if value is False or value is True:  # an unquoted on or off is a string; JSON has booleans
            value = "on" if value else "off"
        if name in self._options and value not in words.split():
            raise self._wrong(name, f"one of {words.replace(' ', ', ')}")
        return value

    def _size(self, name: str) -> int | None:
        value = self._options.get(name)
        if isinstance(value, str):
            value = parse_size(value)
        if name in self._options and (type(value) is not int or not 0 <= value < 1 << 63):
            raise self._wrong(
                name, "a number of bytes, 0 or more; with k, M, G, T, P or E after it"
            )
        return value if isinstance(value, int) else None

    def _wrong(self, name: str, allowed: str) -> ImageError:
        return ImageError(f"{self._at(name)}: {self._options.get(name)!r} is not {allowed}")

    def _at(self, name: str) -> str:
        path = f"{self._path}{name}"  # in a name from JSON there may be anything
        return f"image option {path if path.isprintable() else repr(path)}"


def _listed(names: frozenset[str] | set[str]) -> str:
    return ", ".join(sorted(names))
