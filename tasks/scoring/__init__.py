"""Reads an answer: its refusals, its letter or number, its words. Imports only chat and data."""
