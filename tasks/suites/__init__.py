"""The measurements: one file a family of suites."""
