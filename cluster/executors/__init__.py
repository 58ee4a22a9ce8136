"""Executors: places that run batches of stages. Ray is imported here and nowhere else.

Imports tasks and cluster.store.
"""
