"""The program ``pynbd-qemu-nbd``, and ``python -m pynbd.qemu_nbd``."""

import signal

from pynbd.cli.descriptors import fill_standard_descriptors
from pynbd.cli.signals import ENDING

fill_standard_descriptors()
# A signal that comes while the rest is imported waits; a thread that takes it may only come after
# --fork.
signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)

from pynbd.cli.qemu_nbd.command import main  # noqa: E402 (see above)

if __name__ == "__main__":
    main()
