"""Broken and hostile input for every command and file format: one sentence, nothing lost, nothing
run.
"""
