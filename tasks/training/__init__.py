"""Fine-tuning: the training loop and its engines for one device, a gang and a pack.

Imports tasks, tasks.data and tasks.models.
"""
