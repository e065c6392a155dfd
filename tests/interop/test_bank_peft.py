"""A bank and PEFT's several adapters: the same files give the same logits, row by row."""

import copy
from functools import partial

import peft
import pytest
import torch
import transformers
from interruptions import whole
from peft_models import IDS, QUIET, Net

import lora

pytestmark = QUIET

OURS = {
    "alice": lora.LoraConfig(target_modules=["qkv", "o", "emb"], r=3, lora_alpha=5, init_lora_weights=False),
    "bob": lora.LoraConfig(target_modules=["block.o", "qkv"], r=2, use_rslora=True, init_lora_weights=False),
    "carol": lora.LoraConfig(target_modules=["o", "conv2"], r=2, init_lora_weights=False),
}
THEIRS = {
    "alice": peft.LoraConfig(target_modules=["qkv", "block.o"], r=3, lora_alpha=5, init_lora_weights=False),
    "bob": peft.LoraConfig(target_modules=["head", "qkv"], r=2, use_rslora=True, init_lora_weights=False),
}
ROWS = ["bob", "alice", "__base__", "bob", "alice", "alice"]
BATCH = IDS.repeat(3, 1)


def base():
    torch.manual_seed(0)
    return Net().eval()


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=4e-6 * float(theirs.abs().max()))


@torch.no_grad()
def test_files_of_a_bank_are_adapters_for_peft(tmp_path):
    model = base()
    bank = lora.bank(model, OURS)
    for name in bank:
        bank.save(name, tmp_path / name, "peft")
        theirs = peft.PeftModel.from_pretrained(base(), tmp_path / name)
        with bank.use(name):
            assert_same(model(IDS), theirs(IDS))
        assert (model_of(bank, None, model)(IDS) - theirs(IDS)).abs().max() > 0.01


def model_of(bank, name, model):
    def call(ids):
        with bank.use(name):
            return model(ids)

    return call


@torch.no_grad()
def test_pefts_adapters_are_a_bank_and_mix_in_a_batch_as_there(tmp_path):
    torch.manual_seed(1)
    theirs = peft.PeftModel(base(), THEIRS["alice"], adapter_name="alice")
    theirs.add_adapter("bob", THEIRS["bob"])
    theirs.save_pretrained(tmp_path)  # a folder for each
    model = base()
    bank = lora.bank(model, {name: tmp_path / name for name in THEIRS})
    with bank.rows([None if name == "__base__" else name for name in ROWS]):
        ours = model(BATCH)
    assert_same(ours, theirs.eval()(BATCH, adapter_names=ROWS))
    for name in THEIRS:
        theirs.set_adapter(name)
        with bank.use(name):
            assert_same(model(IDS), theirs(IDS))
    with theirs.disable_adapter(), lora.disabled(model):
        assert_same(model(IDS), theirs(IDS))


# ---- transformers --------------------------------------------------------------------------------------------------


def llama(tied):
    torch.manual_seed(0)
    sizes = {"vocab_size": 12, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": tied}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, pad_token_id=0)).eval()


def of_llama(*targets, **settings):
    return lora.LoraConfig(target_modules=list(targets), r=2, init_lora_weights=False, **settings)


@pytest.mark.parametrize("size", [15, 9])
def test_a_resized_vocabulary_is_that_of_plain_models(size):
    configs = {
        "alice": of_llama("embed_tokens", "q_proj"),
        "bob": of_llama("embed_tokens"),
        "carol": of_llama("v_proj"),
    }
    model = llama(tied=True)
    ones = {}
    bank = lora.bank(model, configs)
    for name in bank:
        ones[name] = llama(tied=True)
        lora.load_adapter(ones[name], bank[name])
    for each in (model, *ones.values()):
        torch.manual_seed(1)
        each.resize_token_embeddings(size, mean_resizing=False)
    ids = torch.randint(size, (3, 4))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, one in ones.items():
        with torch.no_grad(), bank.use(name):
            torch.testing.assert_close(model(ids).logits, one(ids).logits)
        assert all(torch.equal(tensor, lora.adapter_of(one).tensors[key]) for key, tensor in bank[name].tensors.items())
    with torch.no_grad(), bank.rows(["carol", "bob", "alice"]):
        mixed = model(ids).logits
    for row, name in enumerate(["carol", "bob", "alice"]):
        torch.testing.assert_close(mixed[row], ones[name](ids).logits[row], rtol=1e-4, atol=1e-5)


def test_a_head_that_is_replaced_is_named():
    model = llama(tied=False)
    bank = lora.bank(model, {"alice": of_llama("lm_head"), "bob": of_llama("q_proj")})
    model.resize_token_embeddings(15, mean_resizing=False)
    before = whole(model)
    for call in (
        partial(bank.save, "alice", "/x"),
        lambda: bank["bob"],
        partial(bank.update, {"x": of_llama("v_proj")}),
    ):
        with pytest.raises(ValueError, match=r"lm_head: had LoRA, and .* has taken its place.*`keep\(None\)`"):
            call()
    assert whole(model) == before
    bank.keep(None)
    assert not any(isinstance(module, lora.LoRALayer) for module in model.modules())


def test_a_vocabulary_that_was_resized_before_goes_with_the_files(tmp_path):
    model = llama(tied=False)
    model.save_pretrained(tmp_path / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    model.resize_token_embeddings(15, mean_resizing=False)
    bank = lora.bank(model, {"alice": of_llama("q_proj")})
    bank.save("alice", tmp_path / "alice.safetensors")  # has the rows that nobody else has
    bank["old"] = bank["alice"]  # which are in the model
    ids = torch.randint(15, (2, 4))
    with bank.use("old"), torch.no_grad():
        y = model(ids).logits
    other = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    other.resize_token_embeddings(15, mean_resizing=False)
    plain = copy.deepcopy(other)
    lora.load_adapter(other, tmp_path / "alice.safetensors")
    torch.testing.assert_close(other(ids).logits, y)
    with pytest.raises(ValueError, match=r"alice: model\.embed_tokens\.weight: is in the adapter"):
        lora.bank(plain, {"alice": tmp_path / "alice.safetensors"})
