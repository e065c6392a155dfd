"""Other adapters, of whatever rank, in a model that is compiled."""
