"""The guest: NBD servers as others offer them, seen from their clients."""
