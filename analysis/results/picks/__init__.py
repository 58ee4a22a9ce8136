"""The operating point to ship: floors, picks, and the picks that a study has recorded."""
