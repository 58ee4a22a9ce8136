"""What a run of a study will take, found by simulating it, and how such predictions came out.

Imports tasks, cluster, sweeps.study, sweeps.state and sweeps.search.
"""
