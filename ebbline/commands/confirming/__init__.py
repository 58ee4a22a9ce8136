"""`ebbline confirm`: what a search nominated, measured on what did not choose it."""
