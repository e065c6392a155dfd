"""On transformers' own models, and beside peft: the same modules, the same function, the same gradients."""

import copy
import warnings

import peft
import pytest
import torch
import transformers
from accelerate import hooks

import lora

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"vocab_size": 40, "max_position_embeddings": 32}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IDS = torch.tensor([[5, 7, 9, 11, 13], [6, 8, 3, 4, 39]])


def gpt2():
    config = transformers.GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=4, **TOKENS)
    return transformers.GPT2LMHeadModel(config)


def bert():
    config = transformers.BertConfig(**SIZES, **TEXT, **TOKENS, num_labels=3)
    return transformers.BertForSequenceClassification(config)


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **TEXT, **TOKENS, num_key_value_heads=2))


def phi3():
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**SIZES, **TEXT, **TOKENS, num_key_value_heads=2))


def t5():
    config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, **TOKENS)
    return transformers.T5EncoderModel(config)


def made(make):
    torch.manual_seed(0)
    return make().eval()


def beside_peft(make, **fields):
    """The same model adapted by both, A and B random and equal."""
    ours, theirs = made(make), made(make)
    lora.inject(ours, **fields)
    with warnings.catch_warnings():  # peft tells of GPT-2's transposed layers, and of tied heads
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(theirs, peft.LoraConfig(**fields)).base_model.model.eval()
    for name, layer in adapted(ours).items():
        twin = theirs.get_submodule(name)
        pairs = {"lora_A": twin.lora_A, "lora_B": twin.lora_B}
        embedding = {"lora_A": twin.lora_embedding_A, "lora_B": twin.lora_embedding_B}
        for own, parameter in layer.lora_parameters():
            torch.nn.init.normal_(parameter, std=0.3)
            other = pairs[own]["default"].weight if "default" in pairs[own] else embedding[own]["default"]
            other.data.copy_(parameter)
    return ours, theirs


def adapted(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, lora.LoRALayer)}


def by_peft(model):
    layers = (peft.tuners.lora.LoraLayer, peft.tuners.tuners_utils.BaseTunerLayer)
    return {name: m for name, m in model.named_modules() if isinstance(m, layers) and hasattr(m, "lora_A")}


def output(model):
    return model(IDS)[0]


# ---- beside peft -----------------------------------------------------------------------------------------------

CASES = {
    "llama by names": (llama, {"target_modules": ["q_proj", "v_proj"]}),
    "llama by suffix": (llama, {"target_modules": ["self_attn.q_proj", "layers.1.mlp.up_proj"]}),
    "llama by regex": (llama, {"target_modules": r".*layers\.1\..*(up|down)_proj"}),
    "llama all-linear": (llama, {"target_modules": "all-linear"}),
    "llama but some": (llama, {"target_modules": "all-linear", "exclude_modules": ["k_proj", "1.mlp.up_proj"]}),
    "llama but a regex": (llama, {"target_modules": ["q_proj"], "exclude_modules": r"model\.layers\.0\..*"}),
    "llama embedding": (llama, {"target_modules": ["embed_tokens", "o_proj"]}),
    "llama ranks": (
        llama,
        {
            "target_modules": ["q_proj", "k_proj", "v_proj"],
            "rank_pattern": {r"layers\.0\..*": 2, "q_proj": 6, "^model.layers.1.self_attn.v_proj": 3},
            "alpha_pattern": {"v_proj": 5, r"0\.self_attn\.[qk]_proj": 1},
        },
    ),
    "llama rslora": (llama, {"target_modules": ["down_proj"], "use_rslora": True}),
    "phi3 whole": (phi3, {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}),
    "gpt2 by names": (gpt2, {"target_modules": ["c_attn", "c_fc"]}),
    "gpt2 all-linear": (gpt2, {"target_modules": "all-linear"}),
    "bert by names": (bert, {"target_modules": ["query", "value"]}),
    "bert a dense": (bert, {"target_modules": ["attention.output.dense"], "bias": "all"}),
    "bert biases": (bert, {"target_modules": ["query"], "bias": "lora_only"}),
    "bert all-linear": (bert, {"target_modules": "all-linear", "modules_to_save": ["classifier"]}),
    "bert classifier": (bert, {"target_modules": ["query"], "modules_to_save": ["classifier"]}),
    "t5": (t5, {"target_modules": ["q", "wo"], "bias": "all"}),
}


@pytest.mark.parametrize(("make", "fields"), CASES.values(), ids=CASES)
def test_modules_scaling_outputs_and_gradients_are_pefts(make, fields):
    ours, theirs = beside_peft(make, r=4, lora_alpha=6, **fields)
    mine = {name: (layer.r, layer.scaling) for name, layer in adapted(ours).items()}
    assert mine == {n: (layer.r["default"], layer.scaling["default"]) for n, layer in by_peft(theirs).items()}
    got, expected = output(ours), output(theirs)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    weights = torch.linspace(-1, 1, got.numel()).view_as(got)
    (got * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = {canonical(name): p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert {name for name, p in ours.named_parameters() if p.grad is not None} == gradients.keys()
    for name, gradient in gradients.items():
        mine = ours.get_parameter(name).grad
        torch.testing.assert_close(mine, gradient.view_as(mine), rtol=1e-4, atol=1e-4, msg=name)


def canonical(name):
    """peft's name of a parameter as ours."""
    for theirs, ours in {
        "base_layer.": "",
        "modules_to_save.default.": "",
        "lora_embedding_": "lora_",
        ".default.weight": "",
        ".default": "",
    }.items():
        name = name.replace(theirs, ours)
    return name


# ---- on their models -------------------------------------------------------------------------------------------

MODELS = {
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj"], "splits": {"c_attn": (16, 16, 16)},
                    "enable_lora": {"c_attn": [True, False, True]}}),
    "bert": (bert, {"target_modules": ["query", "value", "word_embeddings"], "modules_to_save": ["classifier"]}),
    "llama": (llama, {"target_modules": "all-linear", "bias": "all"}),
    "phi3": (phi3, {"target_modules": "all-linear", "splits": {"qkv_proj": (16, 8, 8), "gate_up_proj": (24, 24)}}),
}  # fmt: skip
either = pytest.mark.parametrize(("make", "fields"), MODELS.values(), ids=MODELS)


def trained(make, fields):
    model = made(make)
    base = copy.deepcopy(model)
    lora.inject(model, **fields, r=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2 * parameter.requires_grad)
    return model, base


@either
def test_outputs_are_bit_identical_right_after_injection(make, fields):
    model = made(make)
    before = output(model)
    lora.inject(model, **fields)
    assert torch.equal(output(model), before)


@either
def test_disabled_and_eject_give_the_base_model(make, fields):
    model, base = trained(make, fields)
    with lora.disabled(model):
        assert torch.equal(output(model), output(base))
    lora.eject(model)
    assert torch.equal(output(model), output(base))
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]


@either
def test_merged_weights_are_the_same_function_in_their_own_classes(make, fields):
    model, base = trained(make, fields)
    expected = output(model)
    base.load_state_dict(lora.merged_state_dict(model), strict=True)
    torch.testing.assert_close(output(base), expected, rtol=1e-4, atol=1e-5)


@either
def test_an_adapter_goes_through_a_file(make, fields, tmp_path):
    model, base = trained(make, fields)
    lora.save_adapter(model, tmp_path / "a")
    lora.load_adapter(base, tmp_path / "a")
    assert torch.equal(output(base), output(model))


@pytest.mark.parametrize("make", [gpt2, llama, bert])
def test_what_from_pretrained_loads_can_be_merged(make, tmp_path):
    made(make).save_pretrained(tmp_path)
    model = type(made(make)).from_pretrained(tmp_path).eval()
    names = {gpt2: ["c_fc"], llama: ["q_proj", "up_proj"], bert: ["query"]}[make]
    lora.inject(model, target_modules=names)
    with torch.no_grad():
        for layer in adapted(model).values():
            layer.lora_B.normal_()
    expected = output(model)
    lora.merge(model)
    torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-5)


def test_the_tied_head_of_gpt2_is_reported_and_not_merged():
    model = made(gpt2)
    report = lora.inject(model, target_modules=["wte"])
    assert "transformer.wte.weight is tied to lm_head.weight, which the adapter leaves alone." in str(report)
    with pytest.raises(ValueError, match="its weight is tied to that of lm_head"):
        lora.merge(model)


def test_a_transposed_layer_prints_like_itself():
    model = made(gpt2)
    lora.inject(model, target_modules=["c_attn"], r=2, splits={"c_attn": (16, 32)})
    assert repr(model.transformer.h[0].attn.c_attn) == (
        "Conv1D(nf=48, nx=16, r=2, lora_alpha=8, splits=(16, 32), enable_lora=(True, True))"
    )


def test_a_module_whose_calls_accelerate_redirects_is_refused():
    model = made(llama)
    for layer in model.model.layers:
        hooks.add_hook_to_module(layer.self_attn.q_proj, hooks.AlignDevicesHook(execution_device="cpu"))
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.q_proj: .*forward"):
        lora.inject(model, target_modules=["q_proj"])


def test_training_lowers_the_loss_of_a_real_architecture():
    model = made(phi3)
    lora.inject(model, **MODELS["phi3"][1], r=4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(6):
        loss = model.train()(IDS, labels=IDS).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.05
