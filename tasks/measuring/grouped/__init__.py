"""Measuring several settings of one model at once: rows of one batch belong to different adapters.

Invariant: grouping changes no key and no byte of an artifact.
"""
