"""Input text: training conversations, prompt sets, the invented language, token batches.

Imports only the files of `tasks` itself; not models, training, defences or measuring.
"""
