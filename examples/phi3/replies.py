"""What the model answers: the part of fine-tuning that one can read."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from phi3.chat_data import Conversation, render
from phi3.loop import evaluating

REPLIES = "replies.jsonl"


class Prompt(NamedTuple):
    """The beginning of a held-out conversation, and how it really went on."""

    conversation: Conversation
    reference: str


def prompts(held_out: list[Conversation], count: int) -> list[Prompt]:
    """The first `count` held-out conversations, up to their first reply."""
    found = []
    for conversation in held_out:
        roles = [message["role"] for message in conversation]
        first = roles.index("assistant")
        if "user" in roles[:first]:  # somebody has to say something first
            found.append(Prompt(conversation[:first], conversation[first]["content"]))
    return found[:count]


@torch.no_grad()
def replies(model: nn.Module, tokenizer: Any, asked: list[Prompt], max_new_tokens: int, batch_size: int) -> list[str]:
    """The likeliest replies, token by token (greedy), with the cache that training does without.

    `batch_size` prompts at a time, which takes hardly longer than one: a token costs the reading of all weights.
    """
    said: list[str] = []
    for start in range(0, len(asked), batch_size):
        some = asked[start : start + batch_size]
        texts = [render(prompt.conversation, tokenizer, add_generation_prompt=True) for prompt in some]
        # Padded on the left, so that every reply begins where its prompt ends.
        inputs = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
        inputs = inputs.to(model.device)
        with evaluating(model):
            output = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=stop_tokens(model, tokenizer),
            )
        new = output[:, inputs["input_ids"].shape[1] :]
        said += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return said


def stop_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
    """The end-of-turn tokens that the model's own settings and its tokenizer name."""
    configured = model.generation_config.eos_token_id
    named = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in [*named, tokenizer.eos_token_id] if token is not None})


def show(prompt: Prompt, replies: dict[str, str]) -> str:
    """A prompt, the true answer, and the model's under each name."""
    said = [f"{message['role']}: {message['content']}" for message in prompt.conversation]
    answers = {"reference": prompt.reference, **replies}
    return "\n".join(["", *said, *(f"  {name}: {text}" for name, text in answers.items())])


def write(output_dir: Path, asked: list[Prompt], before: list[str], after: list[str]) -> None:
    """Prompts, references and both replies, one line each."""
    with open(output_dir / REPLIES, "w", encoding="utf-8") as file:
        for prompt, first, second in zip(asked, before, after, strict=True):
            record = {"messages": prompt.conversation, "reference": prompt.reference}
            file.write(json.dumps({**record, "before": first, "after": second}, ensure_ascii=False) + "\n")
