"""Adapters of other tools load with the values that the tool computes; what a file does not say is asked for."""

import copy
import json

import numpy as np
import pytest
import safetensors.torch
import tools
import torch
from exchange import refused, refuses
from torch import nn

import lora


def changes(model, adapt):
    """By how much each weight of a model changes, in float64, when it is adapted and then merged."""
    model = model.double()
    before = {name: layer.weight.detach().clone() for name, layer in tools.names_of(model).items()}
    adapt(model)
    lora.merge(model)
    return {name: (model.get_submodule(name).weight.detach() - weight).numpy() for name, weight in before.items()}


def agree(got, expected):
    assert {name for name, change in got.items() if change.any()} == set(expected)
    for name, update in expected.items():
        np.testing.assert_allclose(got[name], update, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tool", tools.TOOLS)
def test_an_adapter_does_here_what_it_does_there(tool, tmp_path):
    path, model, updates, more = tools.TOOLS[tool](tmp_path)
    agree(changes(model, lambda model: lora.load_adapter(model, path, **more)), updates)


@pytest.mark.parametrize("tool", tools.TOOLS)
def test_it_loads_again_into_the_layers_that_it_made(tool, tmp_path):
    path, model, updates, more = tools.TOOLS[tool](tmp_path)
    plain = copy.deepcopy(model)
    lora.load_adapter(model, path, **more)
    with torch.no_grad():
        for parameter in lora.lora_state_dict(model).values():
            parameter.zero_()
    lora.load_adapter(model, path, **more)
    lora.save_adapter(model, tmp_path / "ours.safetensors")
    agree(changes(plain, lambda plain: lora.load_adapter(plain, tmp_path / "ours.safetensors")), updates)


@pytest.mark.parametrize(
    ("prefix", "name", "end"),
    [
        ("base_model.model.", "transformer.layers.0.attn1.to_q", ""),
        ("base_model.model.", "transformer.transformer_blocks.0.linear", ""),
        ("", "transformer.layers.0.attn1.to_q", ".default"),
        ("", "transformer.layers.0.0.to_q", ""),  # as in language and vision models that have no `attn` there
    ],
)
def test_a_scaling_is_not_guessed_for_pefts_own_models(prefix, name, end, tmp_path):
    tensors = {f"{prefix}{name}.lora_{part}{end}.weight": torch.ones(2, 2) for part in "AB"}
    path = tools.save(tmp_path / "weights.safetensors", tensors)
    refused(lambda: lora.read_adapter(path), "has no scaling: PEFT says it in adapter_config.json")
    assert lora.read_adapter(path, lora_alpha=8).modules[name].scaling == 4
    # A name of diffusers' own says that it is diffusers', whatever is in it.
    theirs = tools.save(tmp_path / "pytorch_lora_weights.safetensors", tensors)
    assert lora.read_adapter(theirs).modules[name].scaling == 1


# ---- the names of diffusion models ----------------------------------------------------------------------------------


def down_up(key, out=6, into=6, r=2, value=1.0, kernel=()):
    A, B = torch.full((r, into, *kernel), value), torch.full((out, r, *[1] * len(kernel)), value)
    return {f"{key}.lora_down.weight": A, f"{key}.lora_up.weight": B}


def test_without_an_alpha_kohyas_scaling_is_one(tmp_path):
    path, model, updates, _ = tools.kohya(tmp_path, with_alpha=False)
    agree(changes(model, lambda model: lora.load_adapter(model, path)), updates)


@pytest.mark.parametrize("prefix", ["lora_unet", "lora_transformer"])
def test_one_file_for_several_models_of_a_pipeline(tmp_path, prefix):
    path, unet, updates, _ = tools.kohya(tmp_path, prefix)
    tensors = safetensors.torch.load_file(path) | down_up("lora_te1_text_model_encoder_layers_0_self_attn_q_proj")
    tools.save(path, tensors)
    message = refuses(path, "the file holds adapters of several models (lora_te1_, ", model=copy.deepcopy(unet))
    assert 'torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})' in message
    child = "unet" if prefix == "lora_unet" else "transformer"
    whole = nn.ModuleDict({child: unet, "text_encoder": tools.text_encoder()})
    expected = {f"{child}.{name}": update for name, update in updates.items()}
    expected["text_encoder.text_model.encoder.layers.0.self_attn.q_proj"] = np.full((6, 6), 2.0)
    agree(changes(whole, lambda model: lora.load_adapter(model, path)), expected)


def test_a_text_encoder_without_its_text_model(tmp_path):
    flat = tools.nested(encoder__layers__0__self_attn__q_proj=nn.Linear(6, 6))  # as transformers 5 has it
    expected = {"encoder.layers.0.self_attn.q_proj": np.full((6, 6), 2.0)}
    name = "text_model.encoder.layers.0.self_attn.q_proj"
    path = tools.save(tmp_path / "kohya.safetensors", down_up(f"lora_te_{name.replace('.', '_')}"))
    agree(changes(copy.deepcopy(flat), lambda model: lora.load_adapter(model, path)), expected)
    ones = {"lora_A.weight": torch.ones(2, 6), "lora_B.weight": torch.ones(6, 2)}
    tensors = {f"text_encoder.{name}.{own}": tensor for own, tensor in ones.items()}
    path = tools.save(tmp_path / "pytorch_lora_weights.safetensors", tensors)
    agree(changes(flat, lambda model: lora.load_adapter(model, path)), expected)


# Stable Diffusion XL's names and diffusers' names of the same modules.
STABILITY = {
    "input_blocks_0_0": "conv_in",
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_4_1_proj_in": "down_blocks.1.attentions.0.proj_in",
    "input_blocks_8_1_transformer_blocks_9_norm1": "down_blocks.2.attentions.1.transformer_blocks.9.norm1",
    "middle_block_0_emb_layers_1": "mid_block.resnets.0.time_emb_proj",
    "middle_block_1_transformer_blocks_0_attn2_to_out_0": "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0",
    "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
    "output_blocks_0_0_skip_connection": "up_blocks.0.resnets.0.conv_shortcut",
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_5_1_proj_out": "up_blocks.1.attentions.2.proj_out",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
}


def test_stabilitys_names_of_a_unet_are_diffusers(tmp_path):
    model = tools.nested(**{name.replace(".", "__"): nn.Linear(6, 6) for name in STABILITY.values()})
    tensors = {}
    for n, name in enumerate(STABILITY):
        tensors |= down_up(f"lora_unet_{name}", r=1, value=n + 1.0)
    path = tools.save(tmp_path / "sdxl.safetensors", tensors)
    expected = {name: np.full((6, 6), (n + 1.0) ** 2) for n, name in enumerate(STABILITY.values())}
    agree(changes(model, lambda model: lora.load_adapter(model, path)), expected)


def test_a_name_that_may_be_two_modules_is_refused(tmp_path):
    path = tools.save(tmp_path / "a", down_up("lora_unet_a_b_c"))
    model = tools.nested(a__b_c=nn.Linear(6, 6), a_b__c=nn.Linear(6, 6))
    refuses(path, "lora_unet_a_b_c: may be a.b_c or a_b.c.", model=model)


def test_two_names_of_one_module_are_refused(tmp_path):
    path = tools.save(tmp_path / "a", down_up("lora_unet_a_b") | down_up("lora_unet_a.b"))
    refuses(path, model=tools.nested(a__b=nn.Linear(6, 6)))


@pytest.mark.parametrize(("kernel", "layer"), [((1, 1), nn.Linear(6, 6)), ((), nn.Conv2d(6, 6, 1))])
def test_a_kernel_of_one_may_be_stored_either_way(tmp_path, kernel, layer):
    path = tools.save(tmp_path / "a", down_up("lora_unet_proj", kernel=kernel))
    expected = {"proj": np.full(layer.weight.shape, 2.0)}
    agree(changes(tools.nested(proj=layer), lambda model: lora.load_adapter(model, path)), expected)


def test_a_kernel_of_more_than_one_is_no_linear_layers(tmp_path):
    path = tools.save(tmp_path / "a", down_up("lora_unet_proj", kernel=(3, 3)))
    message = "has an adapter of the kind 'conv' in the file, and is of 'linear' in the model"
    refuses(path, message, model=tools.nested(proj=nn.Linear(6, 6)))
    refuses(path, "must have the shape", model=tools.nested(proj=nn.Conv2d(6, 6, 5)))


def test_only_its_model_knows_where_kohyas_dots_are(tmp_path):
    path, *_ = tools.kohya(tmp_path)
    adapter = lora.read_adapter(path)
    assert adapter.format == "kohya"
    message = refused(
        lambda: lora.write_adapter(adapter, tmp_path / "out"), "underscores in the file's names stand for dots"
    )
    assert "stand for dots. Load it into the model with `lora.load_adapter(model, file, …)`" in message


# ---- what is refused ------------------------------------------------------------------------------------------------

GOOD = down_up("lora_unet_a")
AB = {"base_model.model.a.lora_A.weight": torch.ones(2, 6), "base_model.model.a.lora_B.weight": torch.ones(6, 2)}
MLX = {"a.lora_a": torch.ones(6, 2), "a.lora_b": torch.ones(2, 6)}
REFUSED = {
    "LoHa": (GOOD | {"lora_unet_a.hada_w1_a": torch.ones(2, 2)}, "lora_unet_a.hada_w1_a belongs to LoHa"),
    "LoKr alone": ({"lora_unet_a.lokr_w1": torch.ones(2, 2)}, "lora_unet_a.lokr_w1 belongs to LoKr"),
    "Tucker": (
        GOOD | {"lora_unet_a.lora_mid.weight": torch.ones(2, 2, 3, 3)},
        "lora_mid.weight belongs to LoRA with a third",
    ),
    "a difference": (GOOD | {"lora_unet_norm.diff": torch.ones(2)}, "lora_unet_norm.diff belongs to whole differences"),
    "dora_scale": (
        GOOD | {"lora_unet_a.dora_scale": torch.ones(1, 6)},
        "lora_unet_a: `dora_scale` must have a value for each of the 6 outputs, got the shape (1, 6)",
    ),
    "unread": (GOOD | {"x": torch.ones(2)}, "x is no part of an adapter as kohya names them."),
    "several tools": (GOOD | AB, "it has names of several tools, as "),
    "no B": ({"lora_unet_a.lora_down.weight": torch.ones(2, 6)}, "lora_unet_a: lora_B is missing."),
    "alpha alone": (GOOD | {"lora_unet_b.alpha": torch.tensor(1.0)}, "lora_unet_b: lora_A is missing."),
    "alphas": (
        GOOD | {"lora_unet_a.alpha": torch.ones(2)},
        "lora_unet_a: `alpha` must be one number, got the shape (2,)",
    ),
    "NaN": (GOOD | {"lora_unet_a.alpha": torch.tensor(torch.nan)}, "`lora_alpha` must be a finite number"),
    "integers": ({name: tensor.long() for name, tensor in GOOD.items()}, "must hold floating-point numbers"),
    "no scaling": (AB, "has no scaling: PEFT says it in adapter_config.json, which is not there; give `lora_alpha`"),
    "a language model's": (
        {name.replace("base_model.model.", "transformer.h.0."): tensor for name, tensor in AB.items()},
        "has no scaling: PEFT says it in adapter_config.json",
    ),
    "two of one": (AB | {name.replace(".weight", ".b.weight"): t for name, t in AB.items()}, "are both lora_A of a."),
    "a head": (AB | {"base_model.model.head.weight": torch.ones(2)}, "(in adapter_config.json PEFT says what such"),
    "experts": ({name.replace(".a.", ".experts."): t for name, t in AB.items()}, "belongs to LoRA of several experts"),
    "mlx without its scale": (MLX, "mlx-lm says it in adapter_config.json, which is not beside it; give `lora_alpha`"),
    "mlx's experts": ({name: tensor[None] for name, tensor in MLX.items()}, "a.lora_a must be a matrix, got the shape"),
    "torchtune": ({f"{name}.weight": t for name, t in MLX.items()}, "torchtune says it in adapter_config.json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_half_understood_is_refused_by_name(tmp_path, case):
    tensors, message = REFUSED[case]
    refuses(tools.save(tmp_path / "a.safetensors", tensors), message)


def test_a_lora_alpha_that_the_file_says_is_refused(tmp_path):
    for tool in ("kohya", "diffusers", "mlx-lm", "torchtune"):
        folder = tmp_path / tool
        folder.mkdir()
        written = tools.TOOLS[tool](folder)
        with pytest.raises(TypeError, match="`lora_alpha` is for files that do not say it"):
            lora.read_adapter(written.path, lora_alpha=8)


def test_a_lora_alpha_where_the_tool_would_take_one(tmp_path):
    path, model, updates, _ = tools.ai_toolkit(tmp_path)
    expected = {name: 3 / tools.R * update for name, update in updates.items()}
    agree(changes(model, lambda model: lora.load_adapter(model, path, lora_alpha=3)), expected)


CONFIGS = {
    "full": ({"fine_tune_type": "full", "lora_parameters": {"scale": 1}}, "`fine_tune_type` must be 'lora' or 'dora'"),
    "no scale": ({"lora_parameters": {"rank": 2}}, "`lora_parameters` must say `scale`"),
    "nothing": ({}, "`lora_parameters` must say `scale`"),
    "old": (
        {"lora_parameters": {"rank": 2, "scale": 10, "alpha": 16}},
        "mlx-lm multiplied `scale` by alpha / rank up to",
    ),
    "a word": ({"lora_parameters": {"scale": "20"}}, "a number, got '20'"),
    "dropout": (
        {"lora_parameters": {"scale": 20, "dropout": 2}},
        "`lora_dropout` must be at least 0 and below 1, got 2",
    ),
    "infinite": ({"lora_parameters": {"scale": 1e300}}, "`scaling` must be a finite number of at most"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_what_mlx_lms_configuration_must_say(tmp_path, case):
    config, message = CONFIGS[case]
    tools.save(tmp_path / "adapters.safetensors", MLX)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    refuses(tmp_path, message)


def test_an_alpha_that_changes_nothing_is_no_mistake(tmp_path):
    tools.save(tmp_path / "adapters.safetensors", MLX)
    about = {"lora_parameters": {"rank": 2, "scale": 10, "alpha": 2}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(about), encoding="utf-8")
    assert lora.read_adapter(tmp_path).modules["a"].scaling == 10


METADATA = {
    "no JSON": ("{", "its metadata must have an object under 'lora_adapter_metadata'"),
    "a list": ("[]", "its metadata must have an object under 'lora_adapter_metadata'"),
    "another model": ('{"transformer.r": 2}', "unet.a: the metadata say nothing of 'unet'"),
    "another rank": ('{"unet.r": 3, "unet.lora_alpha": 3}', "do not fit r = 3"),
    "another method": ('{"unet.r": 2, "unet.peft_type": "LOHA"}', "`peft_type` must be 'LORA', got 'LOHA'"),
    "more than LoRA": ('{"unet.r": 2, "unet.use_qalora": true}', "`use_qalora` is set"),
    "too intricate": ('{"unet.rank_pattern": {"(a*)*b": 2}}', "is too intricate to be matched safely"),
}


@pytest.mark.parametrize("case", METADATA)
def test_what_diffusers_metadata_must_say(tmp_path, case):
    said, message = METADATA[case]
    tensors = {"unet.a.lora_A.weight": torch.ones(2, 6), "unet.a.lora_B.weight": torch.ones(6, 2)}
    tools.save(tmp_path / "pytorch_lora_weights.safetensors", tensors, {"lora_adapter_metadata": said})
    refuses(tmp_path, message)


def test_a_folder_with_adapters_of_two_tools_is_refused(tmp_path):
    tools.mlx_lm(tmp_path)
    tools.save(tmp_path / "adapter_model.safetensors", AB)
    refuses(tmp_path, "mlx-lm's in adapters.safetensors and PEFT's in adapter_model.safetensors: name the file")
    assert lora.read_adapter(tmp_path / "adapters.safetensors").format == "mlx"


def test_an_embedding_of_mlx_lms_is_not_taken_for_a_linear_layer(tmp_path):
    path, *_ = tools.mlx_lm(tmp_path)
    adapter = lora.read_adapter(path)
    refused(lambda: lora.write_adapter(adapter, tmp_path / "out", "peft"), "which only its model knows")


def test_mlx_lms_dora_has_a_magnitude_for_each_output(tmp_path):
    linear = nn.Linear(6, 8).double()
    A, B, m = torch.randn(2, 6), torch.randn(8, 2), torch.rand(8) + 0.5
    tools.save(tmp_path / "adapters.safetensors", {"it.lora_a": A.T, "it.lora_b": B.T, "it.m": m})
    about = {"fine_tune_type": "dora", "lora_parameters": {"scale": 2.5, "dropout": 0.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(about), encoding="utf-8")
    weight = linear.weight.detach().numpy() + 2.5 * tools.product(A, B)
    weight *= (m.double().numpy() / np.linalg.norm(weight, axis=1))[:, None]
    model = tools.nested(it=linear)
    before = linear.weight.detach().clone().numpy()
    agree(changes(model, lambda model: lora.load_adapter(model, tmp_path)), {"it": weight - before})


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_dora_scale_of_lycoris_with_one_for_each_output(tmp_path, kernel):
    layer = nn.Conv2d(6, 8, 3).double() if kernel else nn.Linear(6, 8).double()
    A, B = torch.randn(2, 6, *kernel), torch.randn(8, 2, *[1] * len(kernel))
    m = torch.rand(8, *[1] * (layer.weight.dim() - 1)) + 0.5
    tensors = {"lora_unet_it.lora_down.weight": A, "lora_unet_it.lora_up.weight": B, "lora_unet_it.dora_scale": m}
    tools.save(tmp_path / "a.safetensors", tensors | {"lora_unet_it.alpha": torch.tensor(3.0)})
    before = layer.weight.detach().clone().numpy()
    weight = (before + 3 / 2 * tools.product(A, B)).reshape(8, -1)
    weight *= (m.double().numpy().ravel() / np.linalg.norm(weight, axis=1))[:, None]
    model = tools.nested(it=layer)
    got = changes(model, lambda model: lora.load_adapter(model, tmp_path / "a.safetensors"))
    agree(got, {"it": weight.reshape(before.shape) - before})


def test_mlx_lms_dora_of_an_embedding_is_another(tmp_path):
    tensors = {"embed.lora_a": torch.ones(6, 2), "embed.lora_b": torch.ones(2, 6), "embed.m": torch.ones(6)}
    tools.save(tmp_path / "adapters.safetensors", tensors)
    about = {"fine_tune_type": "dora", "lora_parameters": {"scale": 2.5}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(about), encoding="utf-8")
    refuses(tmp_path, "embed: mlx-lm has a magnitude (DoRA) for each row", model=tools.nested(embed=nn.Embedding(6, 6)))


def test_litgpts_fused_projection_with_grouped_queries(tmp_path):
    model = tools.nested(transformer__h__0__attn__qkv=nn.Linear(6, 12))  # 8 of queries, 2 of keys, 2 of values
    name, r = "transformer.h.0.attn.qkv", 2
    A, B = torch.randn(2 * r, 6), torch.randn(8 + 2, r)  # of queries and values
    torch.save({"model": {f"{name}.lora_A": A, f"{name}.lora_B": B}}, tmp_path / "lit_model.pth.lora")
    update = np.zeros((12, 6))
    update[:8] = B[:8].double().numpy() @ A[:r].double().numpy() * 16 / r
    update[10:] = B[8:].double().numpy() @ A[r:].double().numpy() * 16 / r

    def adapt(model):
        parts = {"splits": {"qkv": (8, 2, 2)}, "enable_lora": {"qkv": (True, False, True)}}
        lora.inject(model, target_modules=["qkv"], r=r, lora_alpha=16, **parts)
        lora.load_adapter(model, tmp_path / "lit_model.pth.lora", lora_alpha=16)

    agree(changes(model, adapt), {name: update})


# ---- diffusers' file, written ---------------------------------------------------------------------------------------


def of_pipeline(**options):
    model = nn.ModuleDict({"unet": tools.unet(), "text_encoder": tools.text_encoder()})
    lora.inject(model, target_modules="all-linear", r=2, lora_alpha=6, rank_pattern={"q_proj": 3}, **options)
    for parameter in lora.lora_state_dict(model).values():
        nn.init.normal_(parameter)
    return model


def test_what_is_written_for_diffusers(tmp_path):
    model = of_pipeline()
    expected = {name: lora.adapter_of(model).delta(name).numpy() for name in lora.adapter_of(model).modules}
    lora.save_adapter(model, tmp_path / "out", format="diffusers")
    with safetensors.safe_open(tmp_path / "out" / "pytorch_lora_weights.safetensors", "pt") as file:
        configs = json.loads(file.metadata()["lora_adapter_metadata"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {key.partition(".")[0] for key in configs} == {"unet", "text_encoder"}
    for name, update in expected.items():
        child, _, bare = name.partition(".")
        A, B = (tensors.pop(f"{name}.lora_{part}.weight") for part in "AB")
        assert configs[f"{child}.r"] == configs[f"{child}.lora_alpha"] == A.shape[0] == 3  # and s = 1 without these
        assert bare in configs[f"{child}.target_modules"]
        np.testing.assert_allclose(tools.product(A, B), update, rtol=1e-5, atol=1e-5)
    assert not tensors
    assert lora.read_adapter(tmp_path / "out").format == "diffusers"


def test_it_is_read_again_and_replaced(tmp_path):
    model = of_pipeline()
    plain = nn.ModuleDict({"unet": tools.unet(), "text_encoder": tools.text_encoder()})
    for _ in range(2):
        with torch.no_grad():
            for parameter in lora.lora_state_dict(model).values():
                parameter.mul_(-1.5)
        adapter = lora.adapter_of(model)
        lora.save_adapter(model, tmp_path / "out", format="diffusers")
    expected = {name: adapter.delta(name, torch.float64).numpy() for name in adapter.modules}
    agree(changes(plain, lambda plain: lora.load_adapter(plain, tmp_path / "out")), expected)


def test_a_file_of_diffusers_is_written_as_one_again(tmp_path):
    path, *_ = tools.ai_toolkit(tmp_path)
    adapter = lora.read_adapter(path)
    lora.write_adapter(adapter, tmp_path / "out", "diffusers")
    name = "transformer.transformer_blocks.0.attn.to_k"
    assert torch.equal(lora.read_adapter(tmp_path / "out").delta(name), adapter.delta(name))
    message = "what its modules are called outside of the pipeline"
    refused(lambda: lora.write_adapter(adapter, tmp_path / "peft", "peft"), message)


def test_what_diffusers_has_no_place_for(tmp_path):
    bare = tools.unet()
    lora.inject(bare, target_modules=["to_q"], r=2)
    message = refused(lambda: lora.save_adapter(bare, tmp_path / "out", format="diffusers"), "save_adapter: ")
    assert 'lora.save_adapter(torch.nn.ModuleDict({"unet": unet}), folder, format="diffusers")' in message
    embeds = nn.ModuleDict({"text_encoder": nn.ModuleDict({"embed": nn.Embedding(4, 3)})})
    lora.inject(embeds, target_modules=["embed"], r=2)
    message = "text_encoder.embed: diffusers adapts no layer of the kind embedding"
    refused(lambda: lora.save_adapter(embeds, tmp_path / "out", format="diffusers"), message)
    dilated = nn.ModuleDict({"unet": nn.ModuleDict({"conv": nn.Conv2d(4, 3, 3, dilation=2)})})
    lora.inject(dilated, target_modules=["conv"], r=2, factored=True)
    message = "diffusers would compute the update of a convolution without its dilation"
    refused(lambda: lora.save_adapter(dilated, tmp_path / "out", format="diffusers"), message)
    attends = nn.ModuleDict({"unet": nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)})})
    lora.inject(attends, target_modules=["attention"], r=2)
    message = "diffusers adapts layers, and unet.attention has parameters of its own."
    refused(lambda: lora.save_adapter(attends, tmp_path / "out", format="diffusers"), message)
    with_dora = of_pipeline(use_dora=True)
    refused(lambda: lora.save_adapter(with_dora, tmp_path / "out", format="diffusers"), "has a magnitude (DoRA)")
    assert not (tmp_path / "out").exists()


def test_other_modules_that_end_alike_are_no_targets(tmp_path):
    model = nn.ModuleDict({"unet": tools.nested(to_q=nn.Linear(3, 3), attn__to_q=nn.Linear(3, 3))})
    lora.inject(model, target_modules=["unet.to_q"], r=2)
    lora.save_adapter(model, tmp_path / "out", format="diffusers")
    with safetensors.safe_open(tmp_path / "out" / "pytorch_lora_weights.safetensors", "pt") as file:
        configs = json.loads(file.metadata()["lora_adapter_metadata"])
    assert configs["unet.target_modules"] == "to_q"  # a regular expression, for the whole of a name
