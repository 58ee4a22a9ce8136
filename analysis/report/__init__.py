"""The HTML report, its tables and its answers in sentences.

Imports analysis.results and analysis.figures.
"""
