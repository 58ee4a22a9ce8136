"""The faults in what a user wrote: the fields of a study file, and the rows that it names."""
