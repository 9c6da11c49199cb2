"""Guest bytes at guest offsets. Knows no NBD, no socket."""
