"""What is checked before a study runs: its files, models, chat templates and task names.

`ebbline validate` and the start of `ebbline run` find here what a stage would find later.
"""
