"""The driving loop of a study, and the live snapshot that lets other processes watch it.

Imports tasks, cluster and all of sweeps.
"""
