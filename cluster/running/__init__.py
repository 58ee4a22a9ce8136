"""The runner: drives a stage graph to its end with a store, a scheduler and an executor.

Imports tasks and all of cluster.
"""
