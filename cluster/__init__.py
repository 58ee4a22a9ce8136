"""Stores artifacts and runs stages. Folders: store, executors, schedule, running.

Imports tasks.
"""
