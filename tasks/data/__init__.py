"""Text that goes in: conversations for training, prompt sets, the invented language, token batches.

Imports tasks only; not models, training, defences or measuring.
"""
