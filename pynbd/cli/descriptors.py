"""Standard input, output and error: descriptors 0 to 2, also where the parent has closed them."""

from __future__ import annotations

import os


def fill_standard_descriptors() -> None:
    """Let those that are closed be /dev/null. Call it before anything else opens descriptors.

    What is opened gets the lowest free number, and an image or a socket must not become what all
    the world takes for standard input, output or error.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
