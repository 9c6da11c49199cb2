"""Descriptors: 0 to 2, which are standard input, output and error also where the parent has closed
them; and how many there may be.
"""

from __future__ import annotations

import os
import resource

# Enough for as many clients as a machine can serve.
_MANY = 1 << 16


def fill_standard_descriptors() -> None:
    """Let those that are closed be /dev/null. Call it before anything else opens descriptors.

    What is opened gets the lowest free number, and an image or a socket must not become what all
    the world takes for standard input, output or error.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def allow_many_descriptors() -> None:
    """As many as this process may have, if that is not beyond reason. The usual soft limit of 1024
    is for programs that call select(2), which knows no more.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    many = _MANY if hard == resource.RLIM_INFINITY else min(hard, _MANY)
    if soft != resource.RLIM_INFINITY and soft < many:
        resource.setrlimit(resource.RLIMIT_NOFILE, (many, hard))
