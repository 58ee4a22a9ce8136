"""Figures: each draws one kind of result with matplotlib, and says in words what it shows.

Imports analysis.results.
"""
