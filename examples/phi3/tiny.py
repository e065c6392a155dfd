"""A toy Phi-3 in a folder: random weights, one token per byte. For trying things out in seconds.

python -c "from phi3.tiny import save; save('toy')" && python phi3_chat.py --model toy
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]

# As Phi-3-mini-4k-instruct's own: what ends a conversation depends on what is asked for.
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and Phi-3's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(SPECIAL + alphabet)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL[3:],
        chat_template=TEMPLATE,
    )


def model(seed: int = 0, heads: int = 6, key_value_heads: int = 2, layers: int = 2) -> Phi3ForCausalLM:
    """Two small layers with grouped-query attention, so that q, k and v have different sizes."""
    config = Phi3Config(
        vocab_size=len(SPECIAL) + 256,
        hidden_size=8 * heads,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=512,
        original_max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = Phi3ForCausalLM(config).eval()
    made.generation_config.eos_token_id = [2, SPECIAL.index("<|end|>")]
    return made


def save(folder: str | Path, seed: int = 0) -> Path:
    """Model and tokenizer as `--model` wants them."""
    model(seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return Path(folder)
