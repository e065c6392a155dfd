"""Ring 2: what a layer with LoRA is. Walks no model, opens no file."""
