"""`resize_token_embeddings` after `lora.inject`: adapters follow, and a head that lost its own is named."""

import copy
import io
import re

import pytest
import torch
import transformers
from conftest import randomised
from torch import nn
from toy_model import snapshot

import lora

pytestmark = pytest.mark.filterwarnings("ignore:.*mean_resizing.*")

IDS = torch.tensor([[5, 7, 9, 11, 13], [6, 8, 3, 4, 17]])
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def llama(tied):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=tied, **TOKENS,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def adapted(tied, names, **fields):
    model = llama(tied)
    lora.inject(model, target_modules=names, r=2, **fields)
    for module in model.modules():
        if isinstance(module, lora.LoRALayer):
            randomised(module, std=0.3)
    return model


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids).logits


def trained_names(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


# Of a head that is not tied transformers makes a new one; those are below.
EMBEDDING, HEAD = "embed_tokens", "lm_head"
FOLLOWING = [(True, [EMBEDDING]), (False, [EMBEDDING]), (True, [HEAD]), (True, [EMBEDDING, HEAD])]
following = pytest.mark.parametrize(("tied", "names"), FOLLOWING, ids=str)


@following
@pytest.mark.parametrize("size", [44, 40, 30])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_adapters_of_a_vocabulary_follow_it(tied, names, size, use_rslora):
    model = adapted(tied, names, use_rslora=use_rslora)
    before, trained, parameters = logits(model), trained_names(model), dict(model.named_parameters())
    assert any("lora_A" in name for name in trained)
    model.resize_token_embeddings(size)
    kept = min(size, 40)
    got = logits(model)
    assert got.shape[-1] == size
    torch.testing.assert_close(got[..., :kept], before[..., :kept])
    assert trained_names(model) == trained
    for name in trained:  # the objects that an optimizer may hold
        assert model.get_parameter(name) is parameters[name]
    if size > 40:  # an id that is new has its base embedding, and its base logit
        with torch.no_grad():
            new = model.get_input_embeddings()(torch.tensor([41]))
            assert torch.equal(new[0], model.get_input_embeddings().weight[41])
        model.train()(torch.tensor([[41, 5]]), labels=torch.tensor([[41, 5]])).loss.backward()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters() if p.requires_grad)
        layer = model.get_input_embeddings()
        if isinstance(layer, lora.LoRALayer):
            assert layer.lora_A.grad[:, 41].abs().sum() > 0


@following
def test_a_resized_model_goes_through_a_file(tied, names, tmp_path):
    model = adapted(tied, names)
    model.resize_token_embeddings(44)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, lora.LoRALayer):
                randomised(module, std=0.3)
    lora.save_adapter(model, tmp_path / "a")
    other = llama(tied)
    other.resize_token_embeddings(44)
    with torch.no_grad():
        other.get_input_embeddings().weight.copy_(model.get_input_embeddings().weight)
        other.lm_head.weight.copy_(model.lm_head.weight)
    lora.load_adapter(other, tmp_path / "a")
    assert torch.equal(logits(other), logits(model))
    with lora.disabled(model):
        base = logits(model)
    lora.eject(model)
    assert torch.equal(logits(model), base)
    assert type(model.get_input_embeddings()) is nn.Embedding


@pytest.mark.parametrize("train", [False, True])
def test_a_cached_merge_of_the_old_vocabulary_is_not_served(train):
    model = adapted(False, ["embed_tokens"], merge_weights=True)
    before = logits(model)
    model.train(train).resize_token_embeddings(44)
    model.eval()
    torch.testing.assert_close(logits(model)[..., :40], before)
    logits(model, torch.tensor([[41]]))


def test_magnitudes_of_an_embedding_keep_the_gain_when_ids_come(tmp_path):
    model = adapted(False, ["embed_tokens"], use_dora=True)
    before = logits(model)
    model.resize_token_embeddings(60)
    torch.testing.assert_close(logits(model)[..., :40], before, rtol=1e-4, atol=1e-5)


def test_magnitudes_of_an_embedding_cannot_follow_when_ids_go():
    model = adapted(False, ["embed_tokens"], use_dora=True)
    message = (
        "DoRA's magnitudes go with norms over all 40 ids, of which 30 are left: they cannot follow. The weight is cut "
        "already: load the model again, call `resize_token_embeddings` first, and then `lora.inject`."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        model.resize_token_embeddings(30)


@pytest.mark.parametrize("size", [44, 30])
def test_magnitudes_of_a_tied_head_are_of_its_ids(size):
    model = adapted(True, ["lm_head"], use_dora=True)
    before = logits(model)
    model.resize_token_embeddings(size)
    kept = min(size, 40)
    torch.testing.assert_close(logits(model)[..., :kept], before[..., :kept])
    head = model.lm_head
    if size > 40:  # g = 1
        torch.testing.assert_close(head.lora_magnitude[40:], head.weight[40:].norm(dim=1))


@pytest.mark.parametrize("size", [44, 30])
def test_a_start_that_was_taken_out_of_the_embedding_follows(size):
    model, base = llama(False), llama(False)
    lora.inject(model, target_modules=["embed_tokens"], r=2, init_lora_weights="pissa")
    assert model.model.embed_tokens.lora_start is not None
    model.resize_token_embeddings(size)
    with lora.disabled(model):
        torch.testing.assert_close(logits(model)[..., :30], logits(base)[..., :30], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(model)[..., :30], logits(base)[..., :30], rtol=1e-4, atol=1e-5)
    lora.eject(model)
    torch.testing.assert_close(logits(model)[..., :30], logits(base)[..., :30], rtol=1e-4, atol=1e-5)


def test_a_layer_can_be_frozen_after_all():
    model = adapted(False, ["embed_tokens"])
    model.resize_token_embeddings(44)
    layer = model.model.embed_tokens
    assert layer.lora_A.requires_grad
    layer.requires_grad_(False)
    assert not layer.lora_A.requires_grad
    layer.requires_grad_(True)
    layer.num_embeddings = 44  # by something that leaves requires_grad alone
    layer.train().requires_grad_(False)
    assert not layer.lora_A.requires_grad


def test_an_optimizers_old_state_is_refused_by_torch_and_a_new_one_trains():
    model = adapted(False, ["embed_tokens"])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])

    def step(optimizer):
        model.train()(torch.tensor([[5, 39]]), labels=torch.tensor([[5, 39]])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step(optimizer)
    model.resize_token_embeddings(44)
    with pytest.raises(RuntimeError, match="size"):
        step(optimizer)
    A = model.model.embed_tokens.lora_A
    before = A.detach().clone()
    step(torch.optim.Adam([p for p in model.parameters() if p.requires_grad]))
    assert not torch.equal(A, before)


def test_fused_outputs_cannot_be_resized():
    layer = lora.MergedLinear(4, 6, r=2, enable_lora=[True, False])
    before = snapshot(layer)
    message = (
        "`out_features` (=8) must be the sum of `splits` (=(3, 3)), which cannot follow; load the model again, and "
        "resize it before `lora.inject`."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        layer.out_features = 8
    assert snapshot(layer) == before


# ---- a head that is not tied: transformers makes a new one, without LoRA ---------------------------------------

MESSAGE = (
    "lm_head: had LoRA, and a Linear without it has taken its place, as when transformers' `resize_token_embeddings` "
    "makes a new output head; call that first, and then `lora.inject`. (`lora.eject`, or a "
    "bank's `keep(None)`, takes out what is left.)"
)
USES = {
    "save_adapter": lambda model, path: lora.save_adapter(model, path / "b"),
    "load_adapter": lambda model, path: lora.load_adapter(model, path / "a"),
    "adapter_of": lambda model, path: lora.adapter_of(model),
    "merge": lambda model, path: lora.merge(model),
    "merged_state_dict": lambda model, path: lora.merged_state_dict(model),
    "lora_state_dict": lambda model, path: lora.lora_state_dict(model),
    "disabled": lambda model, path: lora.disabled(model).__enter__(),
    "param_groups": lambda model, path: lora.param_groups(model, lr=1),
    "prepare_for_swap": lambda model, path: lora.prepare_for_swap(model, 4),
    "initialize": lambda model, path: lora.initialize(model, "gaussian"),
}


def reloaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("through", [lambda model: model, copy.deepcopy, reloaded], ids=["same", "deepcopy", "pickle"])
@pytest.mark.parametrize("use", USES)
def test_a_head_that_was_replaced_is_named(use, through, tmp_path):
    model = adapted(False, ["q_proj", "lm_head"])
    lora.save_adapter(model, tmp_path / "a")
    through(model).resize_token_embeddings(40)  # nothing to do, nothing replaced
    lora.save_adapter(model, tmp_path / "a")
    model = through(model)
    model.resize_token_embeddings(44)
    model = through(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=re.escape(f"{use}: nothing was done, because\n  - {MESSAGE}")):
        USES[use](model, tmp_path)
    assert snapshot(model) == before


def test_it_is_named_where_it_was_the_only_one_and_where_a_file_adapted_it(tmp_path):
    model = adapted(False, ["lm_head"])
    lora.save_adapter(model, tmp_path / "a")
    other = llama(False)
    lora.load_adapter(other, tmp_path / "a")
    for it in (model, other):
        it.resize_token_embeddings(44)
        with pytest.raises(ValueError, match=re.escape(MESSAGE)):
            lora.save_adapter(it, tmp_path / "b")


@pytest.mark.parametrize("names", [["q_proj", "lm_head"], ["lm_head"]])
def test_ejecting_or_adapting_again_is_the_way_on(names, tmp_path):
    model = adapted(False, names)
    model.resize_token_embeddings(44)
    if len(names) == 2:
        lora.eject(copy.deepcopy(model))
        ejected = copy.deepcopy(model)
        lora.eject(ejected)
        lora.inject(ejected, target_modules=["q_proj"])
        lora.save_adapter(ejected, tmp_path / "a")
    lora.inject(model, target_modules=["lm_head"])
    lora.save_adapter(model, tmp_path / "a")


# ---- what goes on being legal: parts of models, layers taken out on purpose ------------------------------------


def test_a_part_of_a_model_knows_of_its_own_layers_alone(tmp_path):
    model = adapted(False, ["q_proj", "lm_head"])
    model.resize_token_embeddings(44)
    lora.save_adapter(model.model, tmp_path / "a")
    lora.merge(model.model)
    assert not any(isinstance(m, lora.LoRALayer) for m in model.modules())


def test_a_layer_that_is_merged_or_ejected_alone_is_not_missed(tmp_path):
    for take_out in (lora.merge, lora.eject):
        model = adapted(False, ["q_proj", "lm_head"])
        take_out(model.lm_head)
        lora.save_adapter(model, tmp_path / "a")
        lora.save_adapter(reloaded(copy.deepcopy(model)), tmp_path / "a")


def test_layers_that_are_cut_or_stand_aside_are_not_missed(tmp_path):
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4) for _ in range(3)]), "head": nn.Linear(4, 2)})
    lora.inject(model, target_modules=["layers.0", "layers.1", "head"], r=2)
    del model["layers"][0]  # what has number 1 now never had LoRA
    lora.save_adapter(model, tmp_path / "a")
    model["head"] = nn.Identity()
    lora.save_adapter(model, tmp_path / "a")
    del model["head"]
    lora.save_adapter(model, tmp_path / "a")


def test_eject_and_merge_leave_nothing_behind():
    for take_out in (lora.merge, lora.eject):
        model = llama(False)
        before = [sorted(vars(module)) for module in model.modules()]
        lora.inject(model, target_modules=["q_proj", "lm_head", "embed_tokens"])
        model.resize_token_embeddings(40)
        take_out(model)
        assert [sorted(vars(module)) for module in model.modules()] == before


def test_a_failed_injection_leaves_nothing_behind():
    model = llama(False)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="stop"):
        lora.inject(model, target_modules=["lm_head"], init_lora_weights=stop)
    assert snapshot(model) == before


def stop(layer):
    raise RuntimeError("stop")


# ---- within `lora.disabled`, where the base's values stand in the model ----------------------------------------


def in_full(tied, saved):
    model = llama(tied)
    lora.inject(model, target_modules=["q_proj"], r=2, modules_to_save=[saved])
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter += torch.randn(parameter.shape) / 4
    return model


@pytest.mark.parametrize("size", [44, 30])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens"])
def test_what_trains_in_full_follows_a_vocabulary_that_is_resized_in_the_block(tied, saved, size, tmp_path):
    model = in_full(tied, saved)
    before, kept, trained = logits(model), min(size, 40), trained_names(model)
    with lora.disabled(model):
        base = logits(model)
        model.resize_token_embeddings(size)
        torch.testing.assert_close(logits(model)[..., :kept], base[..., :kept])
    assert (before - base).abs().max() > 0.1
    got = logits(model)
    assert got.shape[-1] == size
    torch.testing.assert_close(got[..., :kept], before[..., :kept])
    assert trained_names(model) == trained
    lora.save_adapter(model, tmp_path / "a")
    adapter = lora.read_adapter(tmp_path / "a")
    assert {len(adapter.tensors[name]) for name in adapter.trained_in_full} == {size}
    model(IDS, labels=IDS).loss.backward()
    (gradient,) = (p.grad for name, p in model.named_parameters() if name in trained and "lora_" not in name)
    assert gradient.shape == (size, 16)


def test_another_head_that_is_put_in_there_stays_as_it_is():
    model = in_full(False, "lm_head")
    with lora.disabled(model):
        model.lm_head = nn.Linear(16, 44, bias=False)
        values = model.lm_head.weight.detach().clone()
    assert torch.equal(model.lm_head.weight, values)


# ---- tie_weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("names", [[EMBEDDING], [HEAD], [EMBEDDING, HEAD]], ids=str)
def test_weights_that_are_tied_again_are_what_they_were(tied, names):
    model = adapted(tied, names)
    before, parameters = logits(model), dict(model.named_parameters(remove_duplicate=False))
    model.tie_weights()
    assert torch.equal(logits(model), before)
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())


@pytest.mark.parametrize("names", [[EMBEDDING], [HEAD]], ids=str)
def test_weights_that_are_tied_after_lora_was_put_in_are_the_base_of_both(names):
    model = adapted(False, names)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    embedding, head = model.get_input_embeddings(), model.lm_head
    assert head.weight is embedding.weight
    layer = embedding if names == [EMBEDDING] else head
    delta = layer.lora_delta(layer.lora_A, layer.lora_B) * layer.lora_scaling
    words, outputs = (
        (embedding.weight + delta, head.weight) if layer is embedding else (embedding.weight, head.weight + delta)
    )
    with torch.no_grad():
        torch.testing.assert_close(embedding(IDS), words[IDS])
        hidden = torch.randn(2, 16)
        torch.testing.assert_close(head(hidden), hidden @ outputs.T)
    with pytest.raises(ValueError, match="its weight is tied to that of"):
        lora.merge(model)
