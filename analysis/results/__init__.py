"""Results of a study: collected from the store, compared with statistics, their frontier and costs.

Imports tasks, cluster and sweeps; not the other folders of analysis.
"""
