"""The W&B mirror, and the workspace that shows it. wandb is imported here and nowhere else.

Imports analysis.results and analysis.report.
"""
