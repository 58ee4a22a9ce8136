"""Figures: each module draws one kind of result with matplotlib; `words` describes them in text.

Imports analysis.results.
"""
