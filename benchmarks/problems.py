"""A pretrained model, what it is taught, what it is asked, and what it knew before."""

from __future__ import annotations

import functools
import importlib
import random
import sys
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1] / "examples"))  # which are no package
from phi3 import fetch, pretrained, tiny

IGNORED = -100  # the label of what is not learnt
TOGETHER = 64  # rows in a forward when the model is asked
HELD_OUT_SEED = 1_000_000  # no run's own


class Problem(NamedTuple):
    """A question and its answer, as tokens; the answer ends with what ends a reply."""

    question: list[int]
    answer: list[int]


class World(NamedTuple):
    """All that a run is given; `lesson(seed, number)` is so many problems to learn from."""

    model: nn.Module
    lesson: Callable[[int, int], list[Problem]]
    validation: Sequence[Problem]
    test: Sequence[Problem]
    prose: Tensor  # (rows, length)


class Scores(NamedTuple):
    """What a model makes of problems: the share that it answers exactly, and the loss per token of the answers."""

    exact: float
    loss: float


@functools.cache
def world() -> World:
    """SmolLM2-135M-Instruct, reasoning-gym's sums of two numbers of two digits, and the story that it ships."""
    gym = importlib.import_module("reasoning_gym")
    model, tokenizer = pretrained.load(pretrained.SMOLLM2, fetch.default_cache_dir(), dtype=torch.float32)

    def problems(seed: int, number: int) -> list[Problem]:
        two = {f"{least}_{what}": 2 for least in ("min", "max") for what in ("terms", "digits")}
        entries = gym.create_dataset("chain_sum", seed=seed, size=number, **two)
        # "State the final answer to the following arithmetic problem: 71 - 26 =": what all have in common is left out.
        return [_problem(tokenizer, entry["question"].partition(": ")[2], f" {entry['answer']}") for entry in entries]

    held_out = list({str(problem): problem for problem in problems(HELD_OUT_SEED, 400)}.values())[:384]
    text = files("reasoning_gym").joinpath("data", "in_the_year_2889.txt").read_text(encoding="utf-8")
    return _world(model, problems, held_out, 128, _prose(tokenizer, text, 8, 128))


@functools.cache
def toy() -> World:
    """A model of random weights that learns small sums; nothing is downloaded."""
    model, tokenizer = tiny.model(), tiny.tokenizer()
    sums = [_problem(tokenizer, f"{a}+{b}=", f"{a + b}") for a in range(10) for b in range(10)]
    random.Random(0).shuffle(sums)
    prose = _prose(tokenizer, "What a model has read it can forget. " * 4, 2, 48)
    return _world(model, lambda seed, number: random.Random(seed).choices(sums, k=number), sums[:20], 10, prose)


def _world(
    model: nn.Module,
    problems: Callable[[int, int], list[Problem]],
    held_out: Sequence[Problem],
    validation: int,
    prose: Tensor,
) -> World:
    """With lessons in which nothing is held out."""
    secret = {str(problem) for problem in held_out}

    def lesson(seed: int, number: int) -> list[Problem]:
        found = [problem for problem in problems(seed, 2 * number + 1) if str(problem) not in secret]
        assert len(found) >= number
        return found[:number]

    return World(model.eval(), lesson, held_out[:validation], held_out[validation:], prose)


def _problem(tokenizer: Any, question: str, answer: str) -> Problem:
    return Problem(tokenizer(question).input_ids, [*tokenizer(answer).input_ids, tokenizer.eos_token_id])


def _prose(tokenizer: Any, text: str, rows: int, length: int) -> Tensor:
    """The first tokens of a text, (rows, length)."""
    return torch.tensor(tokenizer(text).input_ids[: rows * length]).view(rows, length)


def batch_of(problems: Sequence[Problem]) -> tuple[Tensor, Tensor]:
    """Tokens and labels, (problems, length): questions have no label, and rows are filled up at their end."""
    length = max(len(question) + len(answer) for question, answer in problems)
    ids, labels = torch.zeros(len(problems), length, dtype=torch.long), torch.full((len(problems), length), IGNORED)
    for row, (question, answer) in enumerate(problems):
        end = len(question) + len(answer)
        ids[row, :end] = torch.tensor(question + answer)
        labels[row, len(question) : end] = torch.tensor(answer)
    return ids, labels


def predictions(model: nn.Module, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (labelled tokens, words) of what comes next, the words that do, and where they are, (rows, length − 1)."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]  # (rows, length − 1, hidden_size)
    labelled = labels[:, 1:] != IGNORED
    return model.lm_head(hidden[labelled]).float(), labels[:, 1:][labelled], labelled


@torch.no_grad()
def scores(model: nn.Module, problems: Sequence[Problem]) -> Scores:
    """Exact is what greedy decoding gives: each token of the answer is the likeliest after those before it."""
    exact, loss, tokens = 0, 0.0, 0
    for first in range(0, len(problems), TOGETHER):
        logits, words, labelled = predictions(model, *batch_of(problems[first : first + TOGETHER]))
        right = torch.ones_like(labelled)
        right[labelled] = logits.argmax(-1) == words
        exact += int(right.all(1).sum())
        loss += float(F.cross_entropy(logits, words, reduction="sum"))
        tokens += len(words)
    return Scores(exact / len(problems), loss / tokens)


@torch.no_grad()
def loss_on(model: nn.Module, prose: Tensor) -> float:
    """The loss per token of a text, of which each row is read by itself."""
    logits, words, _ = predictions(model, prose, prose)
    return float(F.cross_entropy(logits, words))
