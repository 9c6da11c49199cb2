"""Writing qcow2 for a long time, and looking hard: ``python -m interop.soak``, ``make soak``."""
