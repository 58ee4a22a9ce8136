"""One file for each command, or for commands that belong together. Imports everything."""
