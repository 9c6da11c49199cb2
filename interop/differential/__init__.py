"""The same requests to pynbd and to qemu-nbd: what is answered differently, and why it may be."""
