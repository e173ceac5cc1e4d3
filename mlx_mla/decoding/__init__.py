"""Requests to generate text, and text from tokens."""
