"""Defences: post-hoc changes of a trained adapter. Safe LoRA (arXiv 2405.16833) is the first.

Imports tasks and tasks.models.
"""
