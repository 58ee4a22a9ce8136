"""Completions that a person labelled: the sheet, the errors of each scorer, and rates that are
corrected for them.
"""
