"""Judges by name: what each is asked (the published prompts are in `prompts`), how its answer is
read, and what it states. Imports no torch.
"""
