"""The merges room."""
