"""A study: its file, its models, axes and points, its home on disk, and the stages of a point.

May import tasks and cluster, and no other folder of sweeps.
"""
