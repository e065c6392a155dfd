"""Continuous batching: requests that wait join the batch that runs, each in a row with an adapter of its own."""

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

import lora


@dataclass(eq=False)
class Request:
    """A prompt to go on from, and what has been said.

    Attributes:
        adapter: whose answer it is to be; None for the base's.
        prompt: its tokens.
        max_tokens: how many to say, at most.
        stop: tokens that end the answer, and are not part of it.
        tell: called, in the engine's thread, with each new token; with None at the end; with an error instead of it.
        temperature: 0 for the likeliest token, else that of the softmax to draw from.
        seed: what the draws begin with.
        cancelled: nobody waits for the answer any more.
    """

    adapter: str | None
    prompt: list[int]
    max_tokens: int
    stop: frozenset[int]
    tell: Callable[[int | Exception | None], None]
    temperature: float = 0.0
    seed: int = 0
    cancelled: bool = False
    tokens: list[int] = field(default_factory=list)
    reason: str | None = None  # why it ended: "stop" or "length"

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def take(self, logits: Tensor, likeliest: int) -> None:
        """Go on by a token, given the logits (vocab_size) and the likeliest token."""
        if self.cancelled:
            self.reason = "cancelled"
            return
        token = likeliest
        if self.temperature > 0:
            shares = (logits.float() / self.temperature).softmax(-1).cpu()
            token = int(torch.multinomial(shares, 1, generator=self.generator))
        if token in self.stop:
            self.reason = "stop"
        else:
            self.tokens.append(token)
            self.tell(token)
            self.reason = "length" if len(self.tokens) == self.max_tokens else None
        if self.reason:
            self.tell(None)


class Running(NamedTuple):
    """Rows that are computed together. What they have of fewer tokens than the longest is padded on the left."""

    requests: list[Request]
    cache: DynamicCache  # of each layer, keys and values (rows, heads, length, head_dim)
    mask: Tensor  # (rows, length): 1 where there is a token

    def selected(self, rows: Sequence[int]) -> "Running":
        """These rows, in this order, without the padding that all of them have."""
        index = torch.tensor(rows, device=self.mask.device)
        mask = self.mask[index]
        start = int(mask.any(0).int().argmax())
        pairs = ([tensor[index][:, :, start:] for tensor in layer] for layer in _tensors(self.cache))
        return Running([self.requests[row] for row in rows], DynamicCache(pairs), mask[:, start:])

    def joined(self, other: "Running") -> "Running":
        """These rows, then the other's."""
        length = max(self.mask.shape[1], other.mask.shape[1])
        masks = [F.pad(each.mask, (length - each.mask.shape[1], 0)) for each in (self, other)]
        pairs = (
            [_padded(both, length) for both in zip(*layers, strict=True)]
            for layers in zip(_tensors(self.cache), _tensors(other.cache), strict=True)
        )
        return Running(self.requests + other.requests, DynamicCache(pairs), torch.cat(masks))


def _tensors(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


def _padded(both: Sequence[Tensor], length: int) -> Tensor:
    """Keys, or values, of two batches as one (rows, heads, length, head_dim)."""
    return torch.cat([F.pad(each, (0, 0, length - each.shape[2], 0)) for each in both])


class Engine:
    """Answers requests in a thread of its own, as many of them at once as there are, up to `max_rows`.

    Each answer is what the model would say with the request's adapter alone. Before every token, requests that have
    arrived since the last are let in, and those that are done leave.

    Args:
        model: a causal language model of transformers' with a bank; None as the adapter is the model without any.
        bank: its adapters.
        max_rows: how many requests to answer at once; more wait.
    """

    def __init__(self, model: nn.Module, bank: lora.AdapterBank, max_rows: int = 32) -> None:
        self.model, self.bank, self.max_rows = model.eval(), bank, max_rows
        self.most_rows = 0  # at once, so far
        self._waiting: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._closed = threading.Event()

    def start(self) -> None:
        """Let the thread begin."""
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Let a request wait for its turn; it is told of each token."""
        self._waiting.put(request)

    def close(self) -> None:
        """End the thread after the token that it is at. What is not answered gets an error."""
        self._closed.set()
        self._waiting.put(None)  # for a thread that waits
        self._thread.join()

    @torch.inference_mode()
    def _run(self) -> None:
        running: Running | None = None
        while not self._closed.is_set():
            room = self.max_rows - (len(running.requests) if running else 0)
            arrived = self._arrived(room, wait=running is None)
            if arrived:
                running = self._safely(partial(self._let_in, running, arrived), arrived, running)
            elif running:
                running = self._safely(partial(self._step, running), running.requests, None)
            running = self._those_left(running)
        rest = running.requests if running else []
        while not self._waiting.empty():
            rest.append(self._waiting.get())
        for request in filter(None, rest):
            request.tell(RuntimeError("the server is closing"))

    def _arrived(self, room: int, wait: bool) -> list[Request]:
        """Requests that wait, as many as there is room for."""
        found: list[Request] = []
        while len(found) < room and (not self._waiting.empty() or (wait and not found)):
            request = self._waiting.get()
            if request is None:
                break
            if not request.cancelled:
                found.append(request)
        return found

    def _safely(
        self, act: Callable[[], Running], concerned: Sequence[Request], otherwise: Running | None
    ) -> Running | None:
        """What `act` returns. An error ends the requests that it concerns, and no others."""
        try:
            return act()
        except Exception as error:
            for request in concerned:
                request.tell(error)
            return otherwise

    def _let_in(self, running: Running | None, arrived: list[Request]) -> Running:
        """The batch with new rows, whose prompts are read, and each first token said. Sorted by adapter."""
        length = max(len(request.prompt) for request in arrived)
        rows = [[0] * (length - len(request.prompt)) + request.prompt for request in arrived]
        mask = [[0] * (length - len(request.prompt)) + [1] * len(request.prompt) for request in arrived]
        device = next(self.model.parameters()).device
        new = Running(arrived, DynamicCache(), torch.tensor(mask, device=device))
        self._say(new, torch.tensor(rows, device=device))
        both = running.joined(new) if running else new
        places = {name: place for place, name in enumerate(self.bank)}
        order = sorted(range(len(both.requests)), key=lambda row: places.get(both.requests[row].adapter, -1))
        self.most_rows = max(self.most_rows, len(order))
        return both.selected(order)

    def _step(self, running: Running) -> Running:
        """The batch, each row by a token further."""
        ids = torch.tensor([request.tokens[-1:] for request in running.requests], device=running.mask.device)
        running = running._replace(mask=F.pad(running.mask, (0, 1), value=1))
        self._say(running, ids)
        return running

    def _say(self, running: Running, ids: Tensor) -> None:
        """Compute with new tokens (rows, new), and let each request take the next."""
        positions = (running.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]  # (rows, new)
        with self.bank.rows([request.adapter for request in running.requests]):
            logits = self.model(
                input_ids=ids,
                attention_mask=running.mask,
                position_ids=positions,
                cache=running.cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]  # (rows, vocab_size)
        for request, row, likeliest in zip(running.requests, logits, logits.argmax(-1).tolist(), strict=True):
            request.take(row, likeliest)

    def _those_left(self, running: Running | None) -> Running | None:
        """The batch without the requests that are answered; None if there is no other."""
        if running is None:
            return None
        rows = [row for row, request in enumerate(running.requests) if not request.reason]
        if len(rows) == len(running.requests):
            return running
        return running.selected(rows) if rows else None
