"""Models and adapters on disk and in memory: loading, conversion, weights by name, memory needs.

Imports only chat, data and the files of `tasks` itself; not training, defences or measuring.
"""
