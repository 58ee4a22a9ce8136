"""The runner: runs a graph of stages with a store, a scheduler and an executor.

Imports tasks and all of cluster.
"""
