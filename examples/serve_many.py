"""Answers over HTTP for several adapters on one base, all in one batch, as OpenAI's clients ask for completions.

With `pip install aiohttp`, after some runs of phi3_chat.py (or with any adapters that `lora.read_adapter` reads):

    python examples/serve_many.py alice=phi3_chat_output bob=another/adapter.safetensors

    curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" \\
        -d '{"model": "alice", "prompt": "Once upon a time", "max_tokens": 40, "stream": true}'

`model` is an adapter's name, or "base". Requests that arrive meanwhile join the batch that runs, each row with its own
adapter. Prompts go to the model as they are (chat formats are the client's), and the likeliest tokens are said unless
there is a `temperature`. `GET /v1/models` lists the names. This is an example and no product: it has no keys, no limits
for strangers, and listens to this machine alone unless --host says otherwise.

How much one batch is worth on your machine says a load test over loopback, against one adapter at a time:

    python examples/serve_many.py --load-test

Without adapters it takes eight with random weights, which cost what others do.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import torch
from aiohttp import ClientSession, ClientTimeout, web
from phi3 import batching, chat_data, fetch, pretrained, replies
from phi3.errors import UserError
from serve_llama_cpp import count, read

import lora
from lora.errors import table

BASE = "base"  # the name that stands for the model without an adapter
MAX_TOKENS = 16  # of an answer, unless it is asked for more: OpenAI's number
# What a request may say beside model and prompt: of which type it must be, and what holds.
FIELDS = {
    "max_tokens": (int, lambda value: value >= 1, "a count of at least 1"),
    "temperature": ((int, float), lambda value: 0 <= value < 100, "a number from 0 to 100"),
    "seed": (int, lambda value: 0 <= value < 2**63, "a count"),
    "stream": (bool, lambda value: True, "true or false"),
    "ignore_eos": (bool, lambda value: True, "true or false"),
}
PROMPTS = (
    "Tell me a joke.",
    "Hi, how are you?",
    "What did you do last weekend?",
    "Tell me something about cats.",
    "What is your favourite food?",
)


# ---- the server ------------------------------------------------------------------------------------------------------


class Mistake(Exception):
    """What is wrong with a request, and HTTP's number for it."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class Server:
    """The HTTP side of an engine."""

    def __init__(self, engine: batching.Engine, tokenizer: Any) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self.stop = frozenset(replies.stop_tokens(engine.model, tokenizer))
        self.limit = engine.model.config.max_position_embeddings
        self.served = 0

    def app(self) -> web.Application:
        """What aiohttp runs; the engine runs as long."""
        app = web.Application()
        app.add_routes([web.get("/v1/models", self.models), web.post("/v1/completions", self.completions)])
        app.cleanup_ctx.append(self._engine_runs)
        return app

    async def _engine_runs(self, app: web.Application) -> AsyncIterator[None]:
        self.engine.start()
        yield
        await asyncio.to_thread(self.engine.close)

    async def models(self, request: web.Request) -> web.Response:
        """The names that `model` may be."""
        names = [BASE, *self.engine.bank]
        return web.json_response({"object": "list", "data": [{"id": name, "object": "model"} for name in names]})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """An answer, whole or as events."""
        try:
            asked = self._asked(await request.text())
        except Mistake as mistake:
            error = {"message": str(mistake), "type": "invalid_request_error"}
            return web.json_response({"error": error}, status=mistake.status)
        self.served += 1
        head = {"id": f"cmpl-{self.served}", "object": "text_completion", "created": int(time.time())}
        head["model"] = asked["model"]
        work, tokens = self._begun(asked)
        try:
            if asked["stream"]:
                return await self._streamed(request, head, work, tokens)
            text = "".join([piece async for piece in self._pieces(tokens)])
            return web.json_response({**head, "choices": [_choice(text, work.reason)], "usage": _usage(work)})
        except _Failed as failed:
            error = {"message": str(failed), "type": "server_error"}
            return web.json_response({"error": error}, status=500)
        finally:
            work.cancelled = True  # if it goes on, nobody listens

    async def _streamed(
        self, request: web.Request, head: dict[str, Any], work: batching.Request, tokens: asyncio.Queue[Any]
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        await response.prepare(request)
        try:
            async for piece in self._pieces(tokens):
                await response.write(_event({**head, "choices": [_choice(piece, None)]}))
            await response.write(_event({**head, "choices": [_choice("", work.reason)], "usage": _usage(work)}))
        except _Failed as failed:
            await response.write(_event({"error": {"message": str(failed), "type": "server_error"}}))
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    def _asked(self, text: str) -> dict[str, Any]:
        """What a request says, with the defaults; a Mistake with all that is wrong with it."""
        try:
            body = json.loads(text)
        except ValueError as error:
            raise Mistake(f"the body is not JSON: {error}") from error
        if not isinstance(body, dict):
            raise Mistake("the body must be an object")
        defaults = {"max_tokens": MAX_TOKENS, "temperature": 0, "seed": 0, "stream": False, "ignore_eos": False}
        given = {field: value for field, value in body.items() if value is not None}
        asked = defaults | given
        names = [BASE, *self.engine.bank]
        if asked.get("model") not in names:
            raise Mistake(f"there is no model {asked.get('model')!r}, only {', '.join(names)}", 404)
        wrong = [
            f"{field} must be {rule}, got {asked[field]!r}"
            for field, (kind, valid, rule) in FIELDS.items()
            if not isinstance(asked[field], kind)
            or (kind is not bool and isinstance(asked[field], bool))
            or not valid(asked[field])
        ]
        if not isinstance(asked.get("prompt"), str) or not asked["prompt"]:
            wrong.append("prompt must be a text that is not empty")
        if not wrong:
            asked["prompt"] = self.tokenizer(asked["prompt"], add_special_tokens=False)["input_ids"]
            length = len(asked["prompt"]) + asked["max_tokens"]
            if length > self.limit:
                wrong.append(f"prompt and max_tokens make {length} tokens, and the model takes {self.limit}")
        if wrong:
            raise Mistake("; ".join(wrong))
        return asked

    def _begun(self, asked: dict[str, Any]) -> tuple[batching.Request, asyncio.Queue[Any]]:
        """A request that waits for the engine, and where its tokens come."""
        tokens: asyncio.Queue[Any] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        work = batching.Request(
            adapter=None if asked["model"] == BASE else asked["model"],
            prompt=asked["prompt"],
            max_tokens=asked["max_tokens"],
            stop=frozenset() if asked["ignore_eos"] else self.stop,
            tell=lambda token: loop.call_soon_threadsafe(tokens.put_nowait, token),
            temperature=asked["temperature"],
            seed=asked["seed"],
        )
        self.engine.submit(work)
        return work, tokens

    async def _pieces(self, tokens: asyncio.Queue[Any]) -> AsyncIterator[str]:
        """The text of an answer, as it comes; a letter of several tokens comes whole."""
        ids: list[int] = []
        said = ""
        while (token := await tokens.get()) is not None:
            if isinstance(token, Exception):
                raise _Failed(str(token) or type(token).__name__)
            ids.append(token)
            text = self._text(ids)
            if len(text) > len(said) and not text.endswith("\ufffd"):
                yield text[len(said) :]
                said = text
        if rest := self._text(ids)[len(said) :]:
            yield rest

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class _Failed(Exception):
    """The engine could not go on with a request."""


def _choice(text: str, reason: str | None) -> dict[str, Any]:
    return {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}


def _usage(work: batching.Request) -> dict[str, int]:
    said, given = len(work.tokens), len(work.prompt)
    return {"prompt_tokens": given, "completion_tokens": said, "total_tokens": given + said}


def _event(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content)}\n\n".encode()


# ---- the load test ---------------------------------------------------------------------------------------------------


async def load_test(server: Server, requests: int, max_tokens: int, rounds: int) -> str:
    """A table of throughputs over loopback: all adapters in one batch, one at a time, one request at a time."""
    runner = web.AppRunner(server.app())
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1/completions"
        async with ClientSession(timeout=ClientTimeout(total=None)) as session:
            return await _measured(session, url, _bodies(server, requests, max_tokens), rounds)
    finally:
        await runner.cleanup()


def _bodies(server: Server, requests: int, max_tokens: int) -> list[dict[str, Any]]:
    """So many requests for each adapter, in turns, as users of several send them."""
    texts = [
        chat_data.render([{"role": "user", "content": text}], server.tokenizer, add_generation_prompt=True)
        for text in PROMPTS
    ]
    asked = [(name, n) for n in range(requests) for name in server.engine.bank]
    more = {"max_tokens": max_tokens, "ignore_eos": True}  # the same work for all
    return [{"model": name, "prompt": texts[(at + n) % len(texts)], **more} for at, (name, n) in enumerate(asked)]


async def _measured(session: ClientSession, url: str, bodies: Sequence[dict[str, Any]], rounds: int) -> str:
    names = dict.fromkeys(body["model"] for body in bodies)
    ways = {
        "all adapters in one batch": [bodies],
        "one adapter at a time": [[body for body in bodies if body["model"] == name] for name in names],
        "one request at a time": [[body] for body in bodies],
    }

    async def answer(body: dict[str, Any]) -> tuple[str, int]:
        async with session.post(url, json=body) as response:
            said = await response.json()
            if response.status != 200:
                raise UserError(f"the server answers {response.status}: {said['error']['message']}")
            return said["choices"][0]["text"], said["usage"]["completion_tokens"]

    rates: dict[str, list[float]] = {way: [] for way in ways}
    answers: dict[str, dict[str, str]] = {}
    await asyncio.gather(*map(answer, bodies))  # the first of all warms up
    for _ in range(rounds):
        for way, groups in ways.items():
            started, tokens, texts = time.perf_counter(), 0, {}
            for group in groups:
                for body, (text, said) in zip(group, await asyncio.gather(*map(answer, group)), strict=True):
                    texts[json.dumps(body)], tokens = text, tokens + said
            rates[way].append(tokens / (time.perf_counter() - started))
            answers[way] = texts
    rows = []
    for way, found in rates.items():
        ratios = [a / b for a, b in zip(found, rates["one adapter at a time"], strict=True)]
        rows.append((way, f"{statistics.median(found):.1f}", f"{statistics.median(ratios):.2f}"))
    first, *others = answers.values()
    same = sum(all(texts[key] == text for texts in others) for key, text in first.items())
    return (
        f"{table((f'{len(bodies)} requests for {len(names)} adapters', 'tokens/s', 'ratio'), rows)}\n"
        f"Medians of {rounds} rounds, in turns. {same} of {len(bodies)} answers are the same in all ways."
    )


# ---- from the flags --------------------------------------------------------------------------------------------------


def named(text: str) -> tuple[str, Path]:
    """NAME=PATH, for argparse."""
    name, found, path = text.partition("=")
    if not (name and found and path):
        raise ValueError
    return name, Path(path)


def banked(flags: argparse.Namespace, model: Any) -> lora.AdapterBank:
    """The model's bank, with the adapters that the flags name."""
    sources: dict[str, Any] = {name: read(path.expanduser()) for name, path in flags.adapters}
    if len(sources) < len(flags.adapters) or BASE in sources:
        raise UserError(f"each adapter needs a name of its own, other than {BASE!r}")
    if not sources and not flags.load_test:
        raise UserError("no adapters: give them as NAME=PATH")
    if not sources:
        targets = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
        splits = pretrained.fused_splits(model.config, targets)
        config = lora.LoraConfig(r=16, target_modules=targets, splits=splits, init_lora_weights=False)
        sources = {f"random{n}": config for n in range(8)}
    try:
        return lora.bank(model, sources)
    except ValueError as error:
        raise UserError(str(error)) from error


def prepare(flags: argparse.Namespace) -> Server:
    """The model with its bank, behind a server that does not run yet."""
    dtype = getattr(torch, flags.dtype)
    model, tokenizer = pretrained.load(flags.model, flags.cache_dir or fetch.default_cache_dir(), dtype=dtype)
    try:
        model.to(flags.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {flags.device!r}: {error}") from error
    return Server(batching.Engine(model, banked(flags, model), flags.max_rows), tokenizer)


def serve(server: Server, host: str, port: int) -> None:
    """Answer until it is interrupted."""
    try:
        web.run_app(server.app(), host=host, port=port, handler_cancellation=True)
    except OSError as error:
        raise UserError(f"cannot listen at {host}, port {port}: {error}") from error


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("adapters", nargs="*", type=named, metavar="NAME=PATH", help="a name, and an adapter's file, folder or run")
    add("--model", default=pretrained.SMOLLM2, help="the base, as phi3_chat.py's (default: smollm2)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base (default: float32)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, … (default: cuda if any)")
    add("--host", default="127.0.0.1", help="where to listen (default: 127.0.0.1, this machine alone)")
    add("--port", type=int, default=8000, help="(default: 8000)")
    add("--max-rows", type=count, default=32, help="requests in a batch; more wait (default: 32)")
    add("--cache-dir", type=Path, help="as phi3_chat.py's")
    add("--load-test", action="store_true", help="measure throughput instead of serving")
    add("--requests", type=count, default=2, help="of the load test, for each adapter (default: 2)")
    add("--max-tokens", type=count, default=24, help="of the load test, for each request (default: 24)")
    add("--rounds", type=count, default=3, help="of the load test (default: 3)")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Serves until it is interrupted, or runs the load test; 2 for a mistake in what it was given."""
    try:
        flags = parse(argv)
        server = prepare(flags)
        if flags.load_test:
            print(asyncio.run(load_test(server, flags.requests, flags.max_tokens, flags.rounds)))
        else:
            print(f"Answers for {', '.join([BASE, *server.engine.bank])}", flush=True)
            serve(server, flags.host, flags.port)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
