"""The artifact store: where artifacts lie, how they are committed, found, cached and removed.

Imports tasks; not executors, schedule or running.
"""
