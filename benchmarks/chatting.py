"""What benchmarks that learn to chat share: the model and the data of examples/phi3_chat.py, and a toy of both."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "examples"))  # which are no package
import phi3_chat
from phi3 import chat_data, chats, loop, settings, tiny

Settings = dict[str, Any]


@dataclass(frozen=True)
class Course:
    """What a run's data and pace depend on, and the example's settings that are not as the example has them."""

    seed: int
    lr: float
    steps: int
    rows: int
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # "training", "peft" and "run"


def load(course: Course, toy: Path | None = None) -> tuple[nn.Module, chats.Chats, Settings, Settings, Settings]:
    """The pretrained model and the data of a course, and its three dictionaries of settings."""
    changed = {"training": {}, "peft": {}, "run": {}} | dict(course.settings)
    training = phi3_chat.training_config | {"max_steps": course.steps, "seed": 0, "learning_rate": course.lr}
    training |= {"per_device_train_batch_size": course.rows} | changed["training"]
    peft = phi3_chat.peft_config | {"lora_dropout": 0.0} | changed["peft"]
    general = phi3_chat.run_config | {"eval_conversations": 16, "sample_replies": 0} | changed["run"]
    if toy:
        training |= {"max_seq_length": 128}
        general |= {"model": str(toy), "data": str(toy / "chats.jsonl"), "eval_conversations": 4}
    for part in (training, peft, general):
        settings.check(part)
    conversations = chat_data.read(general["data"], general["data_split"], phi3_chat.cache_of(general))
    model, tokenizer = phi3_chat.load_model(general, training)
    data = chats.prepare(conversations, tokenizer, general, training, model.device)
    data = data._replace(order=data.order._replace(seed=course.seed))
    random.seed(course.seed)
    torch.manual_seed(course.seed)
    return model, data, training, peft, general


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, data: chats.Chats, training: Settings) -> Iterator[int]:
    """Train, and say after each step how many there have been."""
    total = training["max_steps"]
    for step in range(total):
        batches = [batch.to(model.device) for batch in data.order.step(step)]
        lr = loop.learning_rate_at(step, total, training)
        loop.train_step(model.train(), optimizer, batches, lr, training["max_grad_norm"])
        yield step + 1


def toy_folder(folder: Path) -> Path:
    """A model that learns in seconds, and a few lines for it to learn."""
    tiny.save(folder)
    with open(folder / "chats.jsonl", "w", encoding="utf-8") as file:
        for n in range(24):
            said = [("user", f"What is {n} plus 1?"), ("assistant", f"It is {n + 1}.")]
            file.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in said]}) + "\n")
    return folder
