"""Ring 3: what is done to a model that exists."""
