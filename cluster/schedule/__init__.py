"""Decides which ready stages start where: needs, estimates, costs, the scheduler, its simulation.

Imports tasks, cluster.store and cluster.executors.
"""
