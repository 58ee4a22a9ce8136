"""Files for a paper or a published adapter: LaTeX, methods text, bundle, model card.

Imports analysis.results, analysis.figures and analysis.report.
"""
