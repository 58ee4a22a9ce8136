"""What goes into a paper or beside a published adapter: LaTeX, methods text, bundle, model card.

Imports analysis.results, analysis.figures and analysis.report.
"""
