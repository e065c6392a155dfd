"""examples/serve_many.py: each answer is what a model with that adapter alone says; HTTP; errors; the load test."""

import asyncio
import json
import queue
import re
import socket

import pytest
import serve_many
import torch
from aiohttp.test_utils import TestClient, TestServer
from phi3 import batching, tiny

import lora

ADAPTERS = {"alice": 2, "bob": 5, "carol": 3}  # with these ranks
TOKENS = 12
PROMPTS = ["Tell me a joke.", "Hi", "What is 3 plus 1? It is"]


def adapted(name: str | None):
    """A plain model with one adapter, or none."""
    model = tiny.model()
    if name is None:
        return model
    torch.manual_seed(ADAPTERS[name])
    lora.inject(model, target_modules=["qkv_proj", "down_proj"], r=ADAPTERS[name], lora_alpha=8)
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def expected() -> dict[tuple[str | None, str], list[int]]:
    """The likeliest tokens, by transformers' own `generate`."""
    tokenizer, found = tiny.tokenizer(), {}
    for name in (None, *ADAPTERS):
        model = adapted(name).eval()
        for prompt in PROMPTS:
            ids = torch.tensor([tokenizer(prompt)["input_ids"]])
            output = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=2)
            found[name, prompt] = output[0, ids.shape[1] :].tolist()
    assert len({tuple(tokens) for tokens in found.values()}) == len(found)  # all say something else
    return found


def engine_of(max_rows: int = 32) -> batching.Engine:
    model = tiny.model()
    return batching.Engine(
        model, lora.bank(model, {name: lora.adapter_of(adapted(name)) for name in ADAPTERS}), max_rows
    )


class Asked(batching.Request):
    """A request that keeps what it is told."""

    def __init__(self, adapter, prompt, max_tokens=TOKENS, stop=(), on_token=lambda request: None, **more):
        self.done: queue.Queue = queue.Queue()
        self.told: list[int] = []

        def tell(token):
            if isinstance(token, int):
                self.told.append(token)
                on_token(self)
            else:
                self.done.put(token)

        ids = tiny.tokenizer()(prompt)["input_ids"]
        super().__init__(adapter, ids, max_tokens, frozenset(stop), tell, **more)

    def answer(self) -> list[int]:
        error = self.done.get(timeout=60)
        assert error is None, error
        return self.told


def answered(engine: batching.Engine, requests: list[Asked]) -> None:
    """Submit, run, and wait until all requests are told so."""
    for request in requests:
        engine.submit(request)
    engine.start()
    for request in requests:
        request.answer()
    engine.close()


def test_rows_of_a_batch_say_what_each_adapter_says_alone(expected):
    engine, batches = engine_of(), []
    rows = engine.bank.rows
    engine.bank.rows = lambda names: (batches.append(names), rows(names))[1]
    asked = {key: Asked(*key) for key in reversed(expected)}
    answered(engine, list(asked.values()))
    assert engine.most_rows == len(expected)
    assert batches[-1] == [name for name, _ in expected]  # sorted, which is fastest
    assert {key: request.told for key, request in asked.items()} == expected
    assert {request.reason for request in asked.values()} == {"length"}


def test_requests_join_and_leave_while_others_are_answered(expected):
    engine = engine_of()
    late = Asked("carol", PROMPTS[0])

    def on_token(request):
        if len(request.told) == 4:
            engine.submit(late)

    early = [Asked("bob", PROMPTS[2], on_token=on_token), Asked("alice", PROMPTS[1], max_tokens=6)]
    for request in early:
        engine.submit(request)
    engine.start()
    told = [request.answer() for request in (*early, late)]
    engine.close()
    assert told == [expected["bob", PROMPTS[2]], expected["alice", PROMPTS[1]][:6], expected["carol", PROMPTS[0]]]
    assert engine.most_rows == 3


def test_more_requests_than_rows_wait(expected):
    engine = engine_of(max_rows=2)
    asked = {key: Asked(*key) for key in list(expected)[::2]}
    answered(engine, list(asked.values()))
    assert engine.most_rows == 2
    assert {key: request.told for key, request in asked.items()} == {key: expected[key] for key in asked}


def test_an_answer_ends_before_a_stop_token(expected):
    tokens = expected["bob", PROMPTS[0]]
    at = next(n for n in range(3, TOKENS) if tokens[n] not in tokens[:n])
    stopped, other = Asked("bob", PROMPTS[0], stop=[tokens[at]]), Asked("alice", PROMPTS[0])
    answered(engine_of(), [stopped, other])
    assert (stopped.told, stopped.reason) == (tokens[:at], "stop")
    assert other.told == expected["alice", PROMPTS[0]]


def test_draws_are_the_requests_own():
    def drawn(*others):
        asked = Asked("bob", PROMPTS[0], temperature=1.0, seed=3)
        answered(engine_of(), [*others, asked])
        return asked.told

    alone = drawn()
    assert drawn(Asked("alice", PROMPTS[2], temperature=2.0), Asked("bob", PROMPTS[1])) == alone
    other = Asked("bob", PROMPTS[0], temperature=1.0, seed=4)
    answered(engine_of(), [other])
    assert other.told != alone


def test_who_does_not_listen_any_more_leaves_the_batch(expected):
    def on_token(request):
        request.cancelled = len(request.told) == 3

    gone, other = Asked("bob", PROMPTS[0], on_token=on_token), Asked("alice", PROMPTS[0])
    engine = engine_of()
    for request in (gone, other):
        engine.submit(request)
    engine.start()
    assert other.answer() == expected["alice", PROMPTS[0]]
    engine.close()
    assert (gone.told, gone.reason) == (expected["bob", PROMPTS[0]][:3], "cancelled")


def test_closing_tells_those_who_wait():
    engine = engine_of(max_rows=1)
    asked = [Asked("bob", PROMPTS[0], max_tokens=400), Asked("alice", PROMPTS[0])]
    for request in asked:
        engine.submit(request)
    engine.start()
    engine.close()
    assert [str(request.done.get(timeout=60)) for request in asked] == ["the server is closing"] * 2


# ---- HTTP ------------------------------------------------------------------------------------------------------------


def with_client(test, engine=None):
    """Run a coroutine function with a client of a server on a free port of this machine."""

    async def run():
        server = serve_many.Server(engine or engine_of(), tiny.tokenizer())
        async with TestClient(TestServer(server.app())) as client:
            return await test(client, server)

    return asyncio.run(run())


async def post(client, **body):
    response = await client.post("/v1/completions", json=body)
    return response.status, await response.json()


async def stream(client, **body):
    """The events of an answer, without the last."""
    async with client.post("/v1/completions", json={**body, "stream": True}) as response:
        assert response.content_type == "text/event-stream"
        *events, done, end = (await response.text()).split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_answers_over_http_are_each_adapters_own(expected):
    text = tiny.tokenizer().decode

    async def ask(client, server):
        asked = [
            {"model": name or "base", "prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True}
            for name, prompt in expected
        ]
        whole = await asyncio.gather(*(post(client, **body) for body in asked))
        events = await asyncio.gather(*(stream(client, **body) for body in asked))
        for (key, tokens), (status, said), pieces in zip(expected.items(), whole, events, strict=True):
            assert status == 200
            assert said["object"] == "text_completion"
            assert said["model"] == (key[0] or "base")
            [choice] = said["choices"]
            assert choice["finish_reason"] == "length"
            assert choice["text"] == text(tokens, skip_special_tokens=True)
            assert said["usage"]["completion_tokens"] == TOKENS
            # In pieces the same; byte by byte, letters of several bytes come whole.
            assert "".join(piece["choices"][0]["text"] for piece in pieces) == choice["text"]
            assert [piece["choices"][0]["finish_reason"] for piece in pieces][-1] == "length"
            assert pieces[-1]["usage"] == said["usage"]
        assert server.engine.most_rows > 1  # some of them together
        names = [model["id"] for model in (await (await client.get("/v1/models")).json())["data"]]
        assert names == ["base", *ADAPTERS]

    with_client(ask)


def test_letters_of_several_tokens_come_whole():
    async def ask(client, server):
        tokens = asyncio.Queue()
        for token in (*server.tokenizer("aé→")["input_ids"], None):
            tokens.put_nowait(token)
        return [piece async for piece in server._pieces(tokens)]

    assert with_client(ask) == ["a", "é", "→"]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"model": "bib"}, 404, "there is no model 'bib', only base, alice, bob, carol"),
        ({"model": "bob", "max_tokens": 0, "temperature": True, "prompt": ""}, 400,
         "max_tokens must be a count of at least 1, got 0; temperature must be a number from 0 to 100, got True; "
         "prompt must be a text that is not empty"),
        ({"model": "bob", "prompt": ["a"]}, 400, "prompt must be a text"),
        ({"model": "bob", "max_tokens": 600}, 400, "make 602 tokens, and the model takes 512"),
        ([1], 400, "the body must be an object"),
    ],
)  # fmt: skip
def test_mistakes_in_a_request_are_told(body, status, message):
    async def ask(client, server):
        if isinstance(body, dict):
            return await post(client, **{"prompt": "Hi", **body})
        response = await client.post("/v1/completions", json=body)
        return response.status, await response.json()

    got, said = with_client(ask)
    assert got == status
    assert message in said["error"]["message"]


def test_a_body_that_is_no_json():
    async def ask(client, server):
        response = await client.post("/v1/completions", data="{")
        return response.status, (await response.json())["error"]["message"]

    status, message = with_client(ask)
    assert status == 400
    assert message.startswith("the body is not JSON: ")


def test_a_model_that_fails_fails_those_whom_it_concerns(expected):
    engine = engine_of()
    forward, fails = engine.model.forward, [True]

    def broken(*args, **kwargs):
        if fails.pop() if fails else False:
            raise RuntimeError("out of memory")
        return forward(*args, **kwargs)

    engine.model.forward = broken

    async def ask(client, server):
        first = await post(client, model="bob", prompt=PROMPTS[0], max_tokens=TOKENS)
        fails.append(True)
        events = await stream(client, model="bob", prompt=PROMPTS[0], max_tokens=TOKENS)
        second = await post(client, model="bob", prompt=PROMPTS[0], max_tokens=TOKENS, ignore_eos=True)
        return first, events, second

    first, events, (status, said) = with_client(ask, engine)
    assert first == (500, {"error": {"message": "out of memory", "type": "server_error"}})
    assert events == [first[1]]
    assert status == 200
    assert said["choices"][0]["text"] == tiny.tokenizer().decode(expected["bob", PROMPTS[0]], skip_special_tokens=True)


def test_a_client_that_hangs_up_frees_its_row():
    engine, requests = engine_of(max_rows=1), []
    submit = engine.submit
    engine.submit = lambda request: (requests.append(request), submit(request))

    async def ask(client, server):
        body = {"model": "bob", "prompt": "Hi", "max_tokens": 500, "stream": True, "ignore_eos": True}
        async with client.post("/v1/completions", json=body) as response:
            await response.content.readline()
            response.close()
        return await post(client, model="alice", prompt="Hi", max_tokens=2)

    assert with_client(ask, engine)[0] == 200
    assert requests[0].reason == "cancelled"
    assert len(requests[0].tokens) < 500


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    tiny.save(folder / "model")
    (folder / "run").mkdir()
    lora.save_adapter(adapted("alice"), folder / "run" / "adapter.safetensors")
    lora.save_adapter(adapted("bob"), folder / "bob.safetensors")
    return folder


def test_the_load_test(folder, capsys):
    adapters = [f"alice={folder / 'run'}", f"bob={folder / 'bob.safetensors'}"]
    flags = ["--model", str(folder / "model"), "--load-test", "--rounds", "2", "--max-tokens", "3", "--device", "cpu"]
    assert serve_many.main([*adapters, *flags]) == 0
    head, *ways, end = capsys.readouterr().out.splitlines()
    assert head.startswith("4 requests for 2 adapters")
    found = dict(re.fullmatch(r"(.*?) +[\d.]+ +([\d.]+)", way).groups() for way in ways)
    assert [*found] == ["all adapters in one batch", "one adapter at a time", "one request at a time"]
    assert float(found["one adapter at a time"]) == 1
    assert end == "Medians of 2 rounds, in turns. 4 of 4 answers are the same in all ways."


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "no adapters: give them as NAME=PATH"),
        (["base={bob}"], "a name of its own, other than 'base'"),
        (["bob={bob}", "bob={bob}"], "a name of its own"),
        (["bob=./nowhere"], "cannot read an adapter: "),
        (["a.b={bob}"], "is no name for an adapter"),
        (["bob={bob}", "--device", "warp"], "--device 'warp'"),
    ],
)
def test_mistakes_get_one_message_and_no_traceback(folder, capsys, flags, message):
    flags = [flag.format(bob=folder / "bob.safetensors") for flag in flags]
    assert serve_many.main([*flags, "--model", str(folder / "model")]) == 2
    error = capsys.readouterr().err
    assert "error: " in error
    assert message in error
    assert "Traceback" not in error


def test_a_port_that_is_taken(folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        flags = [f"bob={folder / 'bob.safetensors'}", "--model", str(folder / "model"), "--device", "cpu"]
        assert serve_many.main([*flags, "--port", str(taken.getsockname()[1])]) == 2
    assert "error: cannot listen at 127.0.0.1, port " in capsys.readouterr().err
