"""The program ``pynbd``, and ``python -m pynbd``."""

import signal
import sys

from pynbd.cli.descriptors import fill_standard_descriptors
from pynbd.cli.signals import watch

fill_standard_descriptors()
if sys.argv[1:2] == ["serve"]:
    watch()  # a signal that comes while the rest is imported ends it like any other
else:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as of any other program, without a traceback

from pynbd.cli.main import main  # noqa: E402 (see above)

if __name__ == "__main__":
    main()
