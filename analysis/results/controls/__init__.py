"""The controls of a study's defences: their measurements, and the means over random draws."""
