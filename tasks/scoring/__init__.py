"""Reads a completion: the part that answers, its refusals, its letter or number, its words."""
