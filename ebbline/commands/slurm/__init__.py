"""`ebbline slurm`: the script of a Slurm job that runs a study, and its submission."""
