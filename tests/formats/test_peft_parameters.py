"""How PEFT's files name and pack adapters of parameters, and what such files cannot say."""

import json

import pytest
import torch
from safetensors.torch import save_file

import lora

E, R, IN, OUT = 3, 2, 5, 4
OWNER = "base_model.model.layers.0.experts"


def folder(path, depths=1, config=None, rank=R):
    """A folder of PEFT's for experts, whose A and B count their own places."""
    tensors = {}
    for depth in range(depths):
        name = OWNER + ".base_layer" * depth
        tensors[f"{name}.lora_A.weight"] = torch.arange(E * rank * IN).view(E * rank, IN) + 100.0 * depth
        tensors[f"{name}.lora_B.weight"] = torch.arange(OUT * rank * E).view(OUT, rank * E) + 100.0 * depth
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "adapter_model.safetensors")
    words = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_parameters": ["experts.down_proj"]}
    (path / "adapter_config.json").write_text(json.dumps({**words, **(config or {})}))
    return path


@pytest.mark.parametrize("layout", [None, "rank_major", "grouped_by_expert"])
def test_experts_are_unpacked_as_the_configuration_says(layout, tmp_path):
    """unsloth's word for how B is packed: by it an older one's B is what it was trained as."""
    config = {} if layout is None else {"lora_B_layout": layout}
    adapter = lora.read_adapter(folder(tmp_path / "peft", config=config))
    name = "layers.0.experts.down_proj"
    A, B = adapter.pair(name)
    assert (A.shape, B.shape) == ((E, R, IN), (E, OUT, R))
    for e in range(E):
        for k in range(R):
            assert torch.equal(A[e, k], (e * R + k) * IN + torch.arange(IN))
            column = e * R + k if layout == "grouped_by_expert" else k * E + e
            assert torch.equal(B[e, :, k], torch.arange(OUT) * R * E + column)
    delta = adapter.delta(name)
    torch.testing.assert_close(delta[1], 2.0 * B[1] @ A[1])


def test_what_unsloth_packed_in_one_way_or_the_other_is_refused(tmp_path):
    config = {"auto_mapping": {"unsloth_fixed": True}}
    with pytest.raises(
        lora.AdapterError,
        match="unsloth wrote it, which until September 2026 packed lora_B of experts otherwise than PEFT",
    ):
        lora.read_adapter(folder(tmp_path / "peft", config=config))
    lora.read_adapter(folder(tmp_path / "peft", config={**config, "lora_B_layout": "rank_major"}))
    lora.read_adapter(folder(tmp_path / "peft", config=config, rank=1))  # at which both are the same


def test_the_last_parameter_of_a_module_is_outermost(tmp_path):
    config = {"target_parameters": ["experts.down_proj", "experts.up_proj", "experts.gate_proj"]}
    adapter = lora.read_adapter(folder(tmp_path / "peft", 3, config))
    first = {name.rpartition(".")[2]: float(adapter.pair(name)[0][0, 0, 0]) for name in adapter.modules}
    assert first == {"down_proj": 0.0, "up_proj": 100.0, "gate_proj": 200.0}


WRONG = {
    "an order that is not known": (
        2,
        {"target_parameters": ["experts.weight", "experts.bias_like"]},
        "layers.0.experts: which pair of A and B belongs to which of .* only PEFT's model says",
    ),
    "more than there are": (
        1,
        {"target_parameters": ["experts.down_proj", "experts.up_proj"]},
        r"`target_parameters` names 2 parameters of it .*, and there are 1 pairs of A and B",
    ),
    "another rank": (1, {"r": 4}, r"layers.0.experts.down_proj: the shapes \(6, 5\) and \(4, 6\) do not fit r = 4"),
    "no list": (1, {"target_parameters": "experts.down_proj"}, "`target_parameters` must be a list of names"),
    "a layout of nobody's": (
        1,
        {"lora_B_layout": "odd"},
        "`lora_B_layout` must be 'rank_major' or 'grouped_by_expert'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_said(case, tmp_path):
    depths, config, said = WRONG[case]
    with pytest.raises(lora.AdapterError, match=said):
        lora.read_adapter(folder(tmp_path / "peft", depths, config))


def test_what_peft_cannot_do_is_said(tmp_path):
    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.down_proj = torch.nn.Parameter(torch.randn(E, OUT, IN))

        def forward(self, x):
            return x @ self.down_proj.mT

    model = torch.nn.ModuleDict({"experts": Experts()})
    lora.inject(model, target_parameters=["experts.down_proj"], r=2, use_dora=True)
    with pytest.raises(lora.AdapterError, match=r"experts.down_proj: PEFT has no DoRA for parameters"):
        lora.save_adapter(model, tmp_path / "dora", format="peft")
    alone = Experts()
    lora.inject(alone, target_parameters=["down_proj"], r=2)
    with pytest.raises(lora.AdapterError, match="down_proj: PEFT adapts no parameters of the model itself"):
        lora.save_adapter(alone, tmp_path / "alone", format="peft")
    twins = torch.nn.ModuleDict({"experts": Experts(), "other": torch.nn.ModuleDict({"experts": Experts()})})
    lora.inject(twins, target_parameters=["experts.down_proj"], r=2, exclude_modules=["other.experts.down_proj"])
    with pytest.raises(lora.AdapterError, match=r"experts.down_proj: PEFT would adapt the parameter of other.experts"):
        lora.save_adapter(twins, tmp_path / "twins", format="peft")
    assert not [*tmp_path.iterdir()]
