"""What `ebbline evaluate` measured: shown, compared, and scored again."""
