"""Proposes the next points: stage-aware search and Optuna's samplers behind one ask/tell protocol.

Imports tasks, cluster, sweeps.study and sweeps.state.
"""
