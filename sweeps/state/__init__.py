"""What is known of a study's points while it runs: trials, points in flight, outcomes, spending.

Imports tasks, cluster and sweeps.study.
"""
