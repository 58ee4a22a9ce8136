"""Models and adapters on disk and in memory: loading, conversion, weights by name, memory needs.

Imports tasks only; not training, defences or measuring.
"""
