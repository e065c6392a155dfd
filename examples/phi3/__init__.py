"""The parts of `phi3_chat.py`: fetching, the model, chat data, the training loop and its report."""
