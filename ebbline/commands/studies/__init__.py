"""The commands about the studies of a home: list, rename, copy, remove."""
