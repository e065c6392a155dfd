"""examples/phi3/replies.py: prompts that are answered together are answered as each alone."""

import pytest
import torch
from phi3 import fetch, pretrained, replies


def prompt(text):
    return replies.Prompt([{"role": "user", "content": text}], "")


@pytest.mark.slow
def test_replies_together_are_the_replies_one_by_one():
    model, tokenizer = pretrained.load("smollm2", fetch.default_cache_dir(), dtype=torch.float32)
    tokenizer.padding_side = "right"  # as training wants it
    texts = ["Hi", "What is the capital of France?", "Say no more than: yes.", "Name two colours, and explain them."]
    expected = []
    for text in texts:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**ids, max_new_tokens=12, do_sample=False)
        expected.append(tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    assert len(set(map(len, expected))) > 1  # some end before others
    for batch_size in (3, 4):
        assert replies.replies(model, tokenizer, list(map(prompt, texts)), 12, batch_size) == expected


def test_no_prompts_no_replies():
    assert replies.replies(None, None, [], 12, 4) == []
