"""The HTML report: its sentences, tables and provenance.

Imports analysis.results and analysis.figures.
"""
