"""Packed weights of other packages: a file for each, none of which is imported by lora."""
