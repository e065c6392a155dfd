"""The commands of `python -m lora`, a file for each, and what they share."""
