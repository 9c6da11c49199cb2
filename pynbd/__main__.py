"""The program ``pynbd``, and ``python -m pynbd``."""

import sys

from pynbd.cli.descriptors import fill_standard_descriptors
from pynbd.cli.signals import watch

if sys.argv[1:2] == ["serve"]:
    fill_standard_descriptors()
    watch()  # a signal that comes while the rest is imported ends it like any other

from pynbd.cli.main import main

if __name__ == "__main__":
    main()
