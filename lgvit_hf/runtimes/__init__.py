"""Exported folders, opened and run: a class per runtime."""
