"""The live page of a study and the server that gives it to a browser.

Imports analysis.results, analysis.figures and analysis.report.
"""
