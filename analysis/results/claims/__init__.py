"""What a result may claim: of a setting by its seeds, of a point by what did not choose it."""
