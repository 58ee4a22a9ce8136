"""Adapters that another tool trained: which of a folder's files are read, and the stage kind
`adapter`, which checks them against a model.
"""
