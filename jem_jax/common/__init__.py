"""Errors and files, for every other folder."""
