"""lm-eval tasks: definitions in data, read without running code, and lm-eval's own tasks on a
snapshot.
"""
