"""The command line and the small public Python face. Nothing imports it."""
