"""Where and how stages run. Folders: store, executors, schedule, running.

Imports tasks.
"""
