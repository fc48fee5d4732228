"""Limits that are checked before memory is allocated."""

DEFAULT_MAX_PIXELS = 2**28
"""Pixels of a picture: 268 million. Callers may raise it."""
MAX_SIDE = 2**20
"""Pixels of a side."""
MAX_TILES = 2**16
MAX_METADATA = 2**24
"""Bytes of one metadata box, decompressed."""
