"""Which ready stages start where and when: needs, estimates, costs, the scheduler, its simulation.

Imports tasks, cluster.store and cluster.executors.
"""
