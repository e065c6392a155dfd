"""Starts that need data, or the weight as it was before it was quantised."""
