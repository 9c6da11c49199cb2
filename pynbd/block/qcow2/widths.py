"""Entries of on-disk tables, of 1 to 64 bits each: from bytes to arrays and back (pure).

docs/interop/qcow2.rst, "Host cluster management": entries of less than a byte fill it from its
least significant bit, longer ones are big endian. Refcounts have ``1 << refcount_order`` bits; the
entries of all other tables have 64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[Any]  # unsigned integers in native byte order


def decode(data: bytes | bytearray | memoryview, bits: int) -> Values:
    """The entries of ``bits`` (1, 2, 4 ... 64) bits each, as an array that can be changed."""
    if bits >= 8:
        stored = np.frombuffer(data, f">u{bits // 8}")
        return stored.astype(stored.dtype.newbyteorder("="))
    single = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little").reshape(-1, bits)
    return np.packbits(single, axis=1, bitorder="little").ravel()


def encode(values: Values, bits: int) -> bytes:
    """The bytes of entries of ``bits`` bits; those of less than a byte fill whole bytes."""
    if bits >= 8:
        return values.astype(f">u{bits // 8}").tobytes()
    single = values[:, None] >> np.arange(bits, dtype=values.dtype) & values.dtype.type(1)
    return np.packbits(single.astype(np.uint8).ravel(), bitorder="little").tobytes()
