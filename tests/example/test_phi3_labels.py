"""examples/phi3/chat_data.py: which tokens a conversation becomes, and which of them are learnt."""

import pytest
from phi3 import chat_data, fetch, pretrained, tiny
from phi3.chat_data import IGNORED
from phi3.errors import UserError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "Hello, friend! 你好"},
    {"role": "user", "content": "Hello, friend! 你好"},  # the same words, which are not a reply here
    {"role": "assistant", "content": "Bye"},
]


def learnt(stretch: chat_data.Tokens, tokenizer) -> list[str]:
    """The text of each run of labelled tokens."""
    runs, last = [], None
    for at, (token, label) in enumerate(zip(*stretch, strict=True)):
        assert label in (IGNORED, token)
        if label != IGNORED:
            runs.append([token]) if last != at - 1 else runs[-1].append(token)
            last = at
    return [tokenizer.decode(run) for run in runs]


def encode(*conversations, max_length=1000, tokenizer=None):
    return chat_data.encode(conversations, tokenizer or tiny.tokenizer(), max_length)


def test_only_replies_and_their_ends_are_learnt():
    [stretch] = encode(CHAT)
    assert learnt(stretch, tiny.tokenizer()) == ["Hello, friend! 你好<|end|>", "Bye<|end|>"]


@pytest.mark.slow
def test_the_same_with_smollm2s_tokenizer():
    folder = pretrained.smollm2_as_phi3(fetch.default_cache_dir())
    tokenizer = pretrained.AutoTokenizer.from_pretrained(folder)
    [stretch] = encode(CHAT, tokenizer=tokenizer)
    assert learnt(stretch, tokenizer) == ["Hello, friend! 你好<|im_end|>", "Bye<|im_end|>"]


def test_the_tokens_are_the_templates():
    tokenizer = tiny.tokenizer()
    [stretch] = encode(CHAT, tokenizer=tokenizer)
    whole = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True)["input_ids"]
    assert stretch.input_ids == whole[: len(stretch.input_ids)]
    assert tokenizer.decode(whole[len(stretch.input_ids) :]) == "\n<|endoftext|>"  # nothing to learn there


def test_a_prompt_for_generation_is_what_comes_before_the_reply():
    tokenizer = tiny.tokenizer()
    [stretch] = encode(CHAT, tokenizer=tokenizer)
    first = next(at for at, label in enumerate(stretch.labels) if label != IGNORED)
    prompt = chat_data.render(CHAT[:2], tokenizer, add_generation_prompt=True)
    assert tokenizer.decode(stretch.input_ids[:first]) == prompt


def test_long_conversations_are_cut_after_replies():
    tokenizer = tiny.tokenizer()
    chat = [{"role": role, "content": f"{n} " + role * 2} for n in range(6) for role in ("user", "assistant")]
    stretches = encode(chat, max_length=90)
    assert len(stretches) == 3
    assert all(len(stretch.input_ids) <= 90 for stretch in stretches)
    assert [text for s in stretches for text in learnt(s, tokenizer)] == [
        f"{n} assistantassistant<|end|>" for n in range(6)
    ]
    whole = chat_data.render(chat, tokenizer)
    assert "".join(tokenizer.decode(stretch.input_ids) for stretch in stretches) == whole.removesuffix(
        "\n<|endoftext|>"
    )


def test_only_a_turn_that_is_too_long_loses_its_end():
    long = [
        {"role": "user", "content": "Tell me"},
        {"role": "assistant", "content": "a" * 100},
        {"role": "user", "content": "More"},
        {"role": "assistant", "content": "b"},
    ]
    first, second = encode(long, max_length=50)
    assert len(first.input_ids) == 50
    assert set(learnt(first, tiny.tokenizer())[0]) == {"a"}
    assert learnt(second, tiny.tokenizer()) == ["b<|end|>"]


def test_a_prompt_that_fills_the_row_leaves_nothing_to_learn():
    assert encode([{"role": "user", "content": "x" * 100}, {"role": "assistant", "content": "y"}], max_length=50) == []


def test_the_first_token_of_a_stretch_is_never_learnt():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] + '<|end|>' }}{% endfor %}"
    [stretch] = encode([{"role": "assistant", "content": "Hello"}], tokenizer=tokenizer)
    assert learnt(stretch, tokenizer) == ["ello<|end|>"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{{ raise_exception('Roles must alternate') }}",
            r"refuses the roles \[user, assistant\]: Roles must alternate",
        ),
        ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", "changes what messages say"),
        ("{% for m in messages[1:] %}{{ m['content'] }}{% endfor %}", "changes what messages say"),
        ("{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}", "no special token"),
    ],
)
def test_templates_that_cannot_be_used(template, message):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=message):
        encode([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}], tokenizer=tokenizer)


def test_a_fingerprint_tells_data_apart():
    prints = [chat_data.fingerprint(encode(chat)) for chat in (CHAT, CHAT, CHAT[:3])]
    assert prints[0] == prints[1] != prints[2]
