"""The state of a study: trials, points in flight, outcomes, races, replicates, spending.

May import tasks, cluster and sweeps.study.
"""
