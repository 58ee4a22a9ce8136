"""Measurement of a model: generation, judges, scorers, metrics, and lm-eval's tasks.

Imports tasks, tasks.data and tasks.models.
"""
