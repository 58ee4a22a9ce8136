"""What came out: results, frontier, statistics, figures, tables, the report, the W&B mirror."""
