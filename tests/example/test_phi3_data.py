"""examples/phi3/chat_data.py: reading conversations and splitting them."""

import json
import sys
import types

import pytest
from phi3 import chat_data, fetch
from phi3.errors import UserError

HELLO = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]


def chat(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What is {number}?"}, {"role": "assistant", "content": f"{number}."}]


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def test_chitchat_alternates_between_user_and_assistant(tmp_path):
    def turn(*texts):
        return [{"text": text, "sender": "x", "timestamp": "y"} for text in texts]

    records = {
        "a": {"messages": [turn("Hello", "you!"), turn(" Hi "), turn("Bye")]},
        "nobody answered": {"messages": [turn("Hello?")]},
        "an empty message": {"messages": [turn("Hello"), turn(" ")]},
    }
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps(records))
    assert list(chat_data.from_chitchat(path)) == [
        [
            {"role": "user", "content": "Hello you!"},
            {"role": "assistant", "content": "Hi"},
            {"role": "user", "content": "Bye"},
        ]
    ]


def test_the_real_chitchat():
    conversations = chat_data.read("chitchat", "train", fetch.default_cache_dir())
    assert len(conversations) > 3900
    for conversation in conversations:
        assert [message["role"] for message in conversation[:2]] == ["user", "assistant"]
        assert all(message["content"] for message in conversation)


def test_jsonl(tmp_path):
    path = write(tmp_path / "chats.jsonl", {"messages": HELLO, "id": 7}, "", {"messages": chat(3)}, {"messages": HELLO})
    assert chat_data.read(path, "train", tmp_path) == [HELLO, chat(3)]  # the same one twice counts once


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "line 2: not JSON"),
        ("[1, 2]", "line 2: expected"),
        ({"text": "Hello"}, "line 2: expected"),
        ({"messages": []}, "line 2: expected"),
        ({"messages": [{"content": "Hello"}]}, "line 2: message 1 has no role"),
        ({"messages": [*HELLO, "Hello"]}, "line 2: message 3 has no role"),
        ({"messages": [{"role": "robot", "content": "Beep"}]}, "line 2: message 1 has the role 'robot'"),
        ({"messages": [{"role": "user", "content": None}]}, "line 2: message 1 has no text"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = write(tmp_path / "chats.jsonl", {"messages": HELLO}, line)
    with pytest.raises(UserError, match=rf"chats.jsonl, {message}"):
        chat_data.read(path, "train", tmp_path)


def test_unreadable_files(tmp_path):
    with pytest.raises(UserError, match=r"cannot read --data .*nowhere.jsonl"):
        chat_data.read(str(tmp_path / "nowhere.jsonl"), "train", tmp_path)
    with pytest.raises(UserError, match="cannot read --data"):
        chat_data.read(str(tmp_path), "train", tmp_path)
    (tmp_path / "chats.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot read --data"):
        chat_data.read(str(tmp_path / "chats.jsonl"), "train", tmp_path)


def test_the_hub_needs_a_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        chat_data.read("someone/chats", "train_sft", tmp_path)


def test_a_data_set_on_the_hub(tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        if split == "nowhere":
            raise ValueError("Unknown split 'nowhere'\nand more")
        return [{"messages": HELLO, "prompt": "Hello"}, {"messages": chat(1)}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert chat_data.read("someone/chats", "train_sft", tmp_path) == [HELLO, chat(1)]
    assert asked == [("someone/chats", "train_sft")]
    with pytest.raises(UserError, match=r"split 'nowhere': Unknown split 'nowhere'$"):
        chat_data.read("someone/chats", "nowhere", tmp_path)


def test_the_split_is_by_conversation_and_repeatable():
    conversations = [chat(number) for number in range(50)]
    train, held_out = chat_data.split_held_out(list(conversations), held_out=10, train=None, seed=0)
    assert (len(train), len(held_out)) == (40, 10)
    assert sorted(map(str, train + held_out)) == sorted(map(str, conversations))
    assert chat_data.split_held_out(list(conversations), 10, None, seed=0) == (train, held_out)
    assert chat_data.split_held_out(list(conversations), 10, None, seed=1) != (train, held_out)
    # How many one trains on does not change what one measures with.
    assert chat_data.split_held_out(list(conversations), 10, 5, seed=0) == (train[:5], held_out)


def test_too_few_conversations():
    silent = [{"role": "user", "content": "Anybody?"}]
    with pytest.raises(UserError, match="holds 2 conversations with a reply; holding out 2"):
        chat_data.split_held_out([chat(1), chat(2), silent], held_out=2, train=None, seed=0)
