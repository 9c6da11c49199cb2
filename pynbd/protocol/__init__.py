"""NBD as its specification writes it. Bytes in, bytes and values out; no I/O."""
