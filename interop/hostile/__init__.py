"""Clients that mean harm, all at once, and a polite one among them."""
