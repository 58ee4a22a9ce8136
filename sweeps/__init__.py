"""Which points: folders study, state, search, forecast, drive. Studies that ship are in studies.

Imports tasks and cluster.
"""
