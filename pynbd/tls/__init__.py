"""TLS for either end: credentials, and a tunnel through a socket. Knows no NBD."""
