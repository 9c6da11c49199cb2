"""Joins language and disk; owns sockets, limits and lives."""
