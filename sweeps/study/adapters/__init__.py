"""The `adapters` of a study: points whose adapter another tool trained."""
