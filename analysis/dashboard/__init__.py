"""The live page of a study and the server for it.

Imports analysis.results, analysis.figures and analysis.report.
"""
