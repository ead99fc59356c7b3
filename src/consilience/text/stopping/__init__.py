"""Stopping rules: when enough draws have been seen."""
