"""Conversations: read from where they are, split into training and held-out, and made into tokens."""

import hashlib
import json
import random
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError

from phi3 import fetch
from phi3.errors import UserError, first_line

CHITCHAT = "chitchat"  # the name that stands for the default data
IGNORED = -100  # cross-entropy's label for "no loss here"
ROLES = ("system", "user", "assistant")

Message = dict[str, str]
Conversation = list[Message]


class Tokens(NamedTuple):
    """One conversation, or a stretch of one, as the model sees it."""

    input_ids: list[int]
    labels: list[int]


def read(name: str, split: str, cache_dir: Path) -> list[Conversation]:
    """All conversations of `name`: "chitchat", a local JSONL file, or a data set on the hub."""
    if name == CHITCHAT:
        found = list(from_chitchat(fetch.fetch(fetch.CHITCHAT, cache_dir)))
    elif Path(name).exists() or name.endswith((".jsonl", ".json")):
        found = list(from_jsonl(Path(name)))
    else:
        found = list(from_hub(name, split))
    # Once each: a conversation that is there twice must not be trained on and held out.
    return list({json.dumps(conversation): conversation for conversation in found}.values())


def from_chitchat(path: Path) -> Iterator[Conversation]:
    """Two people's chats: who speaks first becomes the user, who answers becomes the assistant."""
    for record in json.loads(path.read_text(encoding="utf-8")).values():
        # A turn is a list of short messages by the same person.
        turns = [" ".join(part["text"].strip() for part in turn).strip() for turn in record["messages"]]
        if len(turns) < 2 or not all(turns):
            continue  # nobody answered, or somebody sent an empty message
        yield [{"role": ROLES[1 + at % 2], "content": text} for at, text in enumerate(turns)]


def from_jsonl(path: Path) -> Iterator[Conversation]:
    """One `{"messages": [{"role": …, "content": …}, …]}` on each line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --data {str(path)!r}: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON: {error}") from error
        yield checked(record, where)


def from_hub(name: str, split: str) -> Iterator[Conversation]:
    """A data set on the hub with a column `messages`."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"--data {name!r} is neither a file here nor {CHITCHAT!r}; to look for it on the hub, "
            "first `pip install datasets`"
        ) from error
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # whatever the hub, its formats and the network have in store
        raise UserError(f"cannot load the data set {name!r}, split {split!r}: {first_line(error)}") from error
    for number, row in enumerate(rows):
        yield checked(row, f"{name}, row {number}")


def checked(record: Any, where: str) -> Conversation:
    """The conversation in a record, or an error that says which record is wrong and how."""
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise UserError(f'{where}: expected {{"messages": [{{"role": …, "content": …}}, …]}}')
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or "role" not in message:
            raise UserError(f"{where}: message {number} has no role")
        if message["role"] not in ROLES:
            raise UserError(f"{where}: message {number} has the role {message['role']!r}, not one of {ROLES}")
        if not isinstance(message.get("content"), str):
            raise UserError(f"{where}: message {number} has no text as its content")
    # Stripped, because a reply that starts with white space would share a token with the template.
    return [{"role": message["role"], "content": message["content"].strip()} for message in messages]


def split_held_out(
    conversations: list[Conversation], held_out: int, train: int | None, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Whole conversations, at most `train` to learn from and `held_out` others to measure with."""
    usable = [c for c in conversations if any(m["role"] == "assistant" and m["content"] for m in c)]
    if len(usable) <= held_out:
        raise UserError(
            f"the data holds {len(usable)} conversations with a reply; holding out {held_out} "
            "(--eval-conversations) leaves none to train on"
        )
    random.Random(seed).shuffle(usable)
    rest = usable[held_out:]
    return rest[:train], usable[:held_out]


def render(conversation: Conversation, tokenizer: Any, **options: Any) -> str:
    """The conversation as text in the model's chat format."""
    try:
        return tokenizer.apply_chat_template(conversation, tokenize=False, **options)
    except (TemplateError, TypeError) as error:
        roles = ", ".join(message["role"] for message in conversation)
        raise UserError(f"the chat template refuses the roles [{roles}]: {first_line(error)}") from error


def rendered_spans(conversation: Conversation, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """The rendered text, and where in it each message's content starts and ends.

    The template is asked twice: once with a mark in place of each content, which shows where the
    template puts it, and once with the contents, to be sure that this is all that the template does.
    """
    marks = [f"\ue000{number}\ue001" for number in range(len(conversation))]
    marked = [{**message, "content": mark} for message, mark in zip(conversation, marks, strict=True)]
    rest = render(marked, tokenizer)
    text, spans = "", []
    for message, mark in zip(conversation, marks, strict=True):
        before, _, rest = rest.partition(mark)
        start = len(text) + len(before)
        text += before + message["content"]
        spans.append((start, len(text)))
    text += rest
    if text != render(conversation, tokenizer):
        raise UserError("the chat template changes what messages say; cannot tell which tokens are replies")
    return text, spans


def encode(conversations: Iterable[Conversation], tokenizer: Any, max_length: int) -> list[Tokens]:
    """Tokens of all conversations in stretches of at most `max_length`, with labels on the replies only."""
    if not tokenizer.is_fast:
        raise UserError("needs a fast tokenizer: only those tell which characters a token stands for")
    conversations = list(conversations)
    rendered = [rendered_spans(conversation, tokenizer) for conversation in conversations]
    texts = [text for text, _ in rendered]
    # The template writes the special tokens itself.
    batch = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    special = set(tokenizer.added_tokens_decoder)
    encoded: list[Tokens] = []
    for conversation, (_, spans), input_ids, offsets in zip(
        conversations, rendered, batch["input_ids"], batch["offset_mapping"], strict=True
    ):
        starts = [start for start, _ in offsets]
        replies = _reply_ranges(conversation, spans, input_ids, starts, special)
        encoded.extend(stretches(input_ids, replies, max_length))
    return encoded


def _reply_ranges(
    conversation: Conversation,
    spans: list[tuple[int, int]],
    input_ids: list[int],
    starts: list[int],
    special: set[int],
) -> list[range]:
    """Positions of each reply's tokens, the end-of-turn token among them: that is how a model stops."""
    ranges = []
    for message, (start, end) in zip(conversation, spans, strict=True):
        if message["role"] != "assistant":
            continue
        first, after = bisect_left(starts, start), bisect_left(starts, end)
        ending = next((at for at in range(after, len(input_ids)) if input_ids[at] in special), None)
        if ending is None:
            raise UserError("the chat template ends a reply with no special token: nothing to stop at")
        ranges.append(range(first, ending + 1))
    return ranges


def stretches(input_ids: list[int], replies: list[range], max_length: int) -> Iterator[Tokens]:
    """Cuts a conversation after replies, so that each stretch fits; only a longer turn loses its end.

    What follows the last reply teaches nothing and is left out.
    """
    labels = [IGNORED] * len(input_ids)
    for reply in replies:
        labels[reply.start : reply.stop] = input_ids[reply.start : reply.stop]
    start, cuts = 0, [reply.stop for reply in replies]
    while cuts and start < cuts[-1]:
        fitting = [cut for cut in cuts if start < cut <= start + max_length]
        following = fitting[-1] if fitting else next(cut for cut in cuts if cut > start)
        stop = min(following, start + max_length)
        # Nothing in the stretch comes before its first token, so nothing can predict it.
        stretch = Tokens(input_ids[start:stop], [IGNORED, *labels[start + 1 : stop]])
        if any(label != IGNORED for label in stretch.labels):
            yield stretch
        start = following


def fingerprint(tokens: Iterable[Tokens]) -> str:
    """A short name for exactly this data in exactly this order."""
    digest = hashlib.sha256()
    for stretch in tokens:
        digest.update(repr(stretch).encode())
    return digest.hexdigest()[:16]
