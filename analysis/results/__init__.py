"""Results of a study: read from the store, compared by statistics; their frontier and costs.

Imports tasks, cluster and sweeps; no other folder of analysis.
"""
