"""Executors: places that run batches of stages. Only this folder imports Ray.

Imports tasks and cluster.store.
"""
