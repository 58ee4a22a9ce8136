"""Races: stages of a point in blocks of prompts, and the rules by which a point stops early."""
