"""Outputs of a study: folders results, figures, report, paper, wandb, dashboard.

Imports tasks, cluster and sweeps. Imports no torch and no ray.
"""
