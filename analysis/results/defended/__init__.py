"""Defences compared with their controls and with each other, from the results of a study."""
