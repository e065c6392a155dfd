"""Conversations as the loop needs them: which rows each step sees, and what is measured."""

from typing import Any, NamedTuple

import torch

from phi3 import chat_data, packing, replies
from phi3.errors import UserError
from phi3.settings import Settings


class Chats(NamedTuple):
    """Rows to train on, rows to measure with, and beginnings to have continued."""

    order: packing.Order  # this process's share of each step
    held_out: list[packing.Batch]  # this process's share
    prompts: list[replies.Prompt]
    fingerprint: str


def prepare(
    conversations: list[chat_data.Conversation],
    tokenizer: Any,
    run: Settings,
    training: Settings,
    device: torch.device,
    rank: int = 0,
    ranks: int = 1,
) -> Chats:
    """Splits by conversation, tokenizes, and packs; process number `rank` of `ranks` gets its share of all rows."""
    length, seed, pad = training["max_seq_length"], training["seed"], tokenizer.pad_token_id
    to_train, to_hold = chat_data.split_held_out(
        conversations, run["eval_conversations"], run["train_conversations"], seed
    )
    stretches = chat_data.encode(to_train, tokenizer, length)
    rows = packing.pack(stretches, length)
    held_rows = packing.pack(chat_data.encode(to_hold, tokenizer, length), length)
    if not rows or not held_rows:
        raise UserError("no reply fits into --max-seq-length tokens")
    batch_size, accumulation = training["per_device_train_batch_size"], training["gradient_accumulation_steps"]
    order = packing.Order(rows, batch_size, accumulation, seed, pad, rank, ranks)
    print(
        f"Training on {len(to_train)} conversations in {len(rows)} rows of {length} tokens "
        f"({order.steps_per_epoch} steps to an epoch); {len(to_hold)} others are held out."
    )
    # The longest first: a batch's rows are padded to its longest, and their order changes no sum.
    held_rows.sort(key=lambda row: sum(len(stretch.input_ids) for stretch in row), reverse=True)
    held_rows = packing.share(held_rows, rank, ranks)
    held_out = packing.batches(held_rows, training["per_device_eval_batch_size"], pad)
    prompts = replies.prompts(to_hold, run["sample_replies"])
    return Chats(order, [batch.to(device) for batch in held_out], prompts, chat_data.fingerprint(stretches))
