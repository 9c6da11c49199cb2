"""Faults of the host: every system call of the engine in turn, failing in every way that it can.

The long form is ``python -m interop.faults``; `tests/faults` makes a part of it.
"""
