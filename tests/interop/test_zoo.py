"""Each architecture of the zoo, as it comes from its package: its adapters are in W wherever it computes with it."""

import copy
import re
from collections.abc import Callable, Iterator
from functools import cached_property

import peft
import pytest
import torch
import zoo
from peft_models import QUIET
from torch import Tensor, nn

import lora
from lora.layers.parts import Part
from lora.models.model import names_of

pytestmark = QUIET


class Case:
    """A row's model: the base, one with random adapters, and one whose weights are W by dense arithmetic."""

    def __init__(self, row: zoo.Row, targets=None):
        self.row, self.targets = row, row.targets if targets is None else targets
        torch.manual_seed(0)
        self.pristine = row.make().to(row.dtype).train(row.train)
        self.pristine.requires_grad_(False)  # torch's matmul rounds otherwise where weights train
        for module in self.pristine.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            for one in (module, getattr(module, "config", None)):
                if hasattr(one, "layerdrop"):  # it drops whole layers, and not by torch's random numbers
                    one.layerdrop = 0.0
        with torch.no_grad():  # a model that was trained has no zeros
            for parameter in self.pristine.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        self.inputs = {name: self.cast(value) for name, value in row.inputs().items()}

    def cast(self, value):
        return value.to(self.row.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    @cached_property
    def base(self) -> nn.Module:
        return self.copy()

    def copy(self) -> nn.Module:
        """The base model, which never ran."""
        return copy.deepcopy(self.pristine)

    @cached_property
    def untrained(self) -> nn.Module:
        model = self.copy()
        lora.inject(model, target_modules=self.targets, r=2, lora_alpha=4, **self.row.settings)
        return model

    @cached_property
    def adapted(self) -> nn.Module:
        """The model with random adapters, which never runs."""
        model = copy.deepcopy(self.untrained)
        torch.manual_seed(1)
        for layer in layers_of(model).values():
            for _, parameter in layer.lora_parameters():
                nn.init.normal_(parameter, std=0.3)
        return model

    @cached_property
    def model(self) -> nn.Module:
        return copy.deepcopy(self.adapted)

    @cached_property
    def dense(self) -> nn.Module:
        return self.densified()

    def densified(self) -> nn.Module:
        """The base model with W in the places of the adapted weights, each a Parameter of its own."""
        model = self.copy()
        for name, layer in layers_of(self.adapted).items():
            W = layer.weight.detach() + update(layer, layer.lora_A.detach(), layer.lora_B.detach())
            owner, own = place(model, name, layer)
            setattr(owner, own, nn.Parameter(W))
        return model

    def outputs(self, model: nn.Module) -> list[Tensor]:
        torch.manual_seed(2)
        return [*tensors(model(**self.inputs))]

    @cached_property
    def right(self) -> list[Tensor]:
        return self.outputs(self.dense)


def layers_of(model: nn.Module) -> dict[str, lora.LoRALayer]:
    """Adapted layers by their names, and parts that stand for parameters."""
    return {known[0]: layer for layer, known in names_of(model).items() if isinstance(layer, lora.LoRALayer)}


def place(model: nn.Module, name: str, layer: lora.LoRALayer) -> tuple[nn.Module, str]:
    """The module that has the layer's weight, and the weight's name there."""
    owner, _, own = name.rpartition(".") if isinstance(layer, Part) else (name, "", "weight")
    return model.get_submodule(owner), own


def update(layer: lora.LoRALayer, A: Tensor, B: Tensor) -> Tensor:
    """s · B A in the shape of the weight."""
    if isinstance(layer, lora.layers.conv.ConvLoRA):
        per_group = A.reshape(layer.groups, -1, A[0].numel())  # (groups, r / groups, in / groups · k)
        BA = B.reshape(layer.groups, -1, per_group.shape[1]) @ per_group
    else:
        BA = B @ A
        turned = isinstance(layer, lora.Embedding) or getattr(layer, "fan_in_fan_out", False)
        BA = BA.mT if turned else BA
    return layer.lora_alpha / layer.r * BA.reshape(layer.weight.shape)


def tensors(output: object) -> Iterator[Tensor]:
    """The numbers in a model's output, but for what it keeps for the next word."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for name, value in output.items():
            if name not in ("past_key_values", "cache_params", "state"):
                yield from tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors(value)


def loss(outputs: list[Tensor]) -> Tensor:
    """A sum of all outputs, each with a weight of its own."""
    torch.manual_seed(3)
    return sum((output.double() * torch.randn(output.shape, dtype=torch.float64)).sum() for output in outputs)


def close(got: list[Tensor], expected: list[Tensor], eps: float = 1e-5) -> None:
    """Equal but for rounding; parts of most models compute in float32, whatever goes in."""
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        scale = max(1e-3, b.abs().max().item() if b.numel() else 0)
        torch.testing.assert_close(a, b, rtol=0, atol=eps * scale * (10 if a.dtype == torch.float32 else 1))


def equal(got: list[Tensor], expected: list[Tensor]) -> bool:
    return len(got) == len(expected) and all(map(torch.equal, got, expected))


# ---- the checks -------------------------------------------------------------------------------------------------


def starts(case: Case, tmp_path) -> None:
    """It starts as the base's function."""
    close(case.outputs(copy.deepcopy(case.untrained)), case.outputs(case.base), 1e-6)


def computes(case: Case, tmp_path) -> None:
    """It computes what W computes, and not what W₀ does."""
    got = case.outputs(case.model)
    close(got, case.right)
    before = case.outputs(case.base)
    changed = [
        a.shape != b.shape or (a - b).abs().max() > 1e-2 * b.abs().max() for a, b in zip(got, before, strict=True)
    ]
    assert any(changed)


def learns(case: Case, tmp_path) -> None:
    """A and B get the gradients that W's gives, and what gets none is named."""
    model = case.model
    model.zero_grad()
    loss(case.outputs(model)).backward()
    case.dense.zero_grad()
    loss(case.outputs(case.dense)).backward()
    unused = set()
    for name, layer in layers_of(model).items():
        G = getattr(*place(case.dense, name, layer)).grad
        if G is None or not G.any():
            unused.add(name)
        else:
            A, B = (factor.detach().clone().requires_grad_() for factor in (layer.lora_A, layer.lora_B))
            expected = torch.autograd.grad(update(layer, A, B), [A, B], G)
            assert layer.lora_A.grad is not None, name
            assert layer.lora_B.grad is not None, name
            close([layer.lora_A.grad, layer.lora_B.grad], list(expected), 1e-4)
    known = {name for name in layers_of(model) if re.fullmatch(case.row.unused, name)}
    assert unused == known, f"{unused - known} get no gradient, and {known - unused} get one"
    assert set(lora.check(model).idle) == unused


def saves(case: Case, tmp_path) -> None:
    """What is saved is the same function."""
    lora.save_adapter(case.adapted, tmp_path / "adapter.safetensors")
    other = case.copy()
    lora.load_adapter(other, tmp_path / "adapter.safetensors")
    assert equal(case.outputs(other), case.outputs(case.model))


def merges(case: Case, tmp_path) -> None:
    """Merged, it is the same function in plain layers."""
    model = copy.deepcopy(case.adapted)
    lora.merge(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in case.base.modules()]
    close(case.outputs(model), case.right)


def is_disabled(case: Case, tmp_path) -> None:
    """Disabled, it is the base model, bit by bit."""
    with lora.disabled(case.model):
        assert equal(case.outputs(case.model), case.outputs(case.base))


def ejects(case: Case, tmp_path) -> None:
    """Ejected, it is the base model: its classes, its keys, its values."""
    model = copy.deepcopy(case.adapted)
    lora.eject(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in case.pristine.modules()]
    state, expected = model.state_dict(), case.pristine.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def goes_to_peft(case: Case, tmp_path) -> None:
    """PEFT computes the same with our adapter."""
    lora.save_adapter(case.adapted, tmp_path / "ours", format="peft")
    theirs = peft.PeftModel.from_pretrained(case.copy(), tmp_path / "ours").train(case.row.train)
    close(case.outputs(theirs.base_model.model), case.right)


def comes_from_peft(case: Case, tmp_path) -> None:
    """PEFT's adapter of the same layers computes the same here."""
    attention = {name for name, module in case.pristine.named_modules() if isinstance(module, nn.MultiheadAttention)}
    named, parts = set(), []  # attention is named whole in PEFT
    for name, layer in layers_of(case.adapted).items():
        around = name.rpartition(".")[0]
        if isinstance(layer, Part) and around not in attention:
            parts.append(name)
        else:
            named.add(around if around in attention else name)
    names = "|".join(map(re.escape, named))  # a pattern of whole names, not of ends
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=names, target_parameters=parts or None, init_lora_weights=False
    )
    theirs = peft.get_peft_model(case.copy(), config).train(case.row.train)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    other = case.copy()
    lora.load_adapter(other, tmp_path / "theirs")
    close(case.outputs(other), case.outputs(theirs.base_model.model))


def recomputes(case: Case, tmp_path) -> None:
    """Gradient checkpointing changes no gradient, where the model has it."""
    if not getattr(case.base, "supports_gradient_checkpointing", False):
        return
    grads = []
    for checkpointing in (False, True):
        model = copy.deepcopy(case.adapted).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        loss(case.outputs(model)).backward()
        grads.append([p.grad for layer in layers_of(model).values() for _, p in layer.lora_parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        assert (plain is None) == (recomputed is None)
        if plain is not None:
            close([recomputed], [plain])


def generates(case: Case, tmp_path) -> None:
    """It generates what W does, where the model can generate."""
    if not (hasattr(case.base, "can_generate") and case.base.can_generate()):
        return
    inputs = {name: value for name, value in case.inputs.items() if not name.startswith("decoder_")}
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "num_beams": 1}
    with torch.no_grad():
        got, expected = (
            model.eval().generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
            for model in (copy.deepcopy(case.adapted), case.densified())
        )
    assert torch.equal(got.sequences, expected.sequences)
    close(list(got.logits), list(expected.logits), 1e-4)


QUICK = [computes, learns, is_disabled]
SLOW = [starts, saves, merges, ejects, goes_to_peft, comes_from_peft, recomputes, generates]


def run(case: Case, checks: list[Callable[..., None]], tmp_path) -> None:
    """All checks; those with a known fault must fail."""
    wrong = []
    for check in checks:
        known = case.row.faults.get(check.__name__)
        try:
            check(case, tmp_path)
        except Exception as error:
            if known is None:
                wrong.append(f"{check.__name__}: {type(error).__name__}: {error}")
        else:
            if known is not None:
                wrong.append(f"{check.__name__}: works now; take it out of the row's faults")
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.sampled(45)
@pytest.mark.parametrize("name", zoo.ROWS)
def test_a_model_with_adapters_is_that_of_w(name, tmp_path):
    run(Case(zoo.ROWS[name]), QUICK, tmp_path)


@pytest.mark.slow
@pytest.mark.sampled(60, others="exhaustive")
@pytest.mark.parametrize("name", zoo.ROWS)
def test_it_starts_is_saved_merged_ejected_checkpointed_and_exchanged_with_peft_and_generates(name, tmp_path):
    run(Case(zoo.ROWS[name]), SLOW, tmp_path)


def test_the_table_is_a_zoo():
    assert len(zoo.ROWS) >= 60
    checks = {check.__name__ for check in (*QUICK, *SLOW)}
    assert all(set(row.faults) <= checks for row in zoo.ROWS.values())
