"""The drop-in for qemu-nbd: its argument vector, its lifetime, its ways in the background."""
