"""A study: its file, its models, axes and points, its home on disk, and the stages of a point.

Imports tasks and cluster; not the other folders of sweeps.
"""
