"""The artifact store: commits, finds, caches and removes artifacts.

Imports tasks; not executors, schedule or running.
"""
