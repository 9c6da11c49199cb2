"""Other people's programs against pynbd. One behaviour per file, ``test_<tool>_<behaviour>.py``."""
