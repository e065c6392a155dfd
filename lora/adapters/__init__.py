"""Ring 4: an adapter without its model: its parts, its file, and how it fits a model."""
