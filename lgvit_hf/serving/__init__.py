"""Highways that answer for others, in batch engines and as services."""
