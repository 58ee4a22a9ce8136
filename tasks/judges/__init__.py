"""The judges that ebbline knows by name, as facts that a study is checked with. Imports nothing."""
