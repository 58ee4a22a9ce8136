"""Fine-tuning: the training loop, and what its steps run on: one device, a gang, a pack.

Imports tasks, tasks.data and tasks.models.
"""
