"""The W&B mirror, and the workspace that shows it. Only this folder imports wandb.

Imports analysis.results and analysis.report.
"""
