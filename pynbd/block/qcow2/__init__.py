"""qcow2, as docs/interop/qcow2.rst of QEMU specifies it."""
