"""pynbd side by side with qemu-nbd and nbdkit: ``python -m interop.bench [--quick]``."""
