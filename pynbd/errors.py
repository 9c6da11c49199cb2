"""What can go wrong, as one tree.

::

    PynbdError
    ├── ProtocolError              the peer broke a rule it MUST keep: disconnect
    ├── OptionError                an option is answered with NBD_REP_ERR_*; haggling goes on
    ├── RequestError               a request is answered with an NBD error; the connection goes on
    ├── ImageError                 an image cannot be opened or served as asked
    │   ├── CorruptImage           its bytes contradict the format's specification
    │   ├── UnsupportedFeature     it needs a feature that pynbd does not have
    │   └── ImageLocked            another process holds a conflicting lock
    ├── DiskError                  a disk failed while it was copied or compared
    │   ├── MapError               it could not say where it has data
    │   ├── ReadError              it could not be read
    │   └── WriteError             it could not be written
    ├── TlsError                   TLS could not be set up: its files, or the handshake
    └── UsageError                 a combination of arguments that makes no sense

Trouble with the disk itself stays ``OSError``: its errno becomes an NBD error in one function,
`pynbd.server.commands.nbd_error`. ``assert`` is for our own invariants, never for bytes from a
peer or a disk.
"""


class PynbdError(Exception):
    """The root of every exception that pynbd raises on purpose."""


class ProtocolError(PynbdError):
    """The peer violated a mandatory rule of the NBD specification; the session cannot go on."""


class OptionError(PynbdError):
    """An option that is answered with an error reply.

    ``reply`` is the NBD_REP_ERR_* value, ``message`` a short text for a person (under 900 bytes).
    """

    def __init__(self, reply: int, message: str) -> None:
        super().__init__(message)
        self.reply = reply
        self.message = message


class RequestError(PynbdError):
    """A request that is answered with an error.

    ``error`` is one of the eight NBD_E* values of the specification ("Error values"),
    ``message`` a short text for a person (under 900 bytes).
    """

    def __init__(self, error: int, message: str) -> None:
        super().__init__(message)
        self.error = error
        self.message = message


class ImageError(PynbdError):
    """An image cannot be opened or served as asked. The text names the file and the reason; it is
    one line, whatever is in the names that an image gives of others.
    """

    def __str__(self) -> str:
        return "".join(sign if sign.isprintable() else "?" for sign in super().__str__())


class CorruptImage(ImageError):
    """Bytes of an image contradict its format. The text names the file, the place and the rule."""


class UnsupportedFeature(ImageError):
    """An image needs a feature that pynbd does not have. The text names the feature."""


class ImageLocked(ImageError):
    """Another process holds a lock on the image that conflicts with what was asked."""


class DiskError(PynbdError):
    """A disk failed while it was worked on. The text names it, the place and the reason."""


class MapError(DiskError):
    """A disk could not say where it has data."""


class ReadError(DiskError):
    """A disk could not be read."""


class WriteError(DiskError):
    """A disk could not be written."""


class TlsError(PynbdError):
    """TLS could not be set up. The text names the file, or what failed in the handshake."""


class UsageError(PynbdError):
    """Arguments that contradict each other. The text names them and what is allowed."""
