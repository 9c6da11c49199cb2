"""Arguments in, text out: the only floor that reads argv and the environment."""
