"""Runs, records, reports and comparisons: everything above the library itself."""
