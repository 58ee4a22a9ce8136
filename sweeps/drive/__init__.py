"""The driving loop of a study, and the live snapshot that others watch it by.

Imports tasks, cluster and all of sweeps.
"""
