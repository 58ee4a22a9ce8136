"""The `defences` of a study: points that differ in what changes their adapter after training."""
