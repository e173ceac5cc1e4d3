"""Scores on the field's tasks."""
