"""QLoRA: the pretrained linear layers in 4 or 8 bits, by bitsandbytes, under an adapter in full precision."""

import copy
import importlib
import logging
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

import lora
from lora.layers.weights import is_packed, read_weight
from phi3.errors import UserError
from phi3.settings import Settings
from phi3.starting import LOFTQ

_BLOCK = 64  # values of a 4-bit weight that share a constant


def quantize(model: nn.Module, way: str | None, peft: Settings) -> dict[str, Tensor]:
    """Replaces the linear layers, but for the output embeddings and those that train in full; prints what it saved.

    Returns the weights that there were, by name, if the adapter is to start from what they lose (LoftQ).
    """
    if not way:
        return {}
    try:
        bitsandbytes = importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise UserError(f"--quantize {way} needs bitsandbytes (pip install bitsandbytes): {error}") from error
    logging.getLogger("bitsandbytes.autograd").setLevel(logging.ERROR)  # int8 says at each layer how it casts
    layers = dict(_linear_layers(model, peft["modules_to_save"] or []))
    # On a CPU bitsandbytes 0.50 takes a 4-bit weight's blocks to end with its rows: others come out wrong.
    uneven = [name for name, layer in layers.items() if way != "int8" and layer.in_features % _BLOCK]
    layers = {name: layer for name, layer in layers.items() if name not in uneven}
    if not layers:
        raise UserError(f"--quantize {way}: no linear layer's number of inputs is a multiple of {_BLOCK}")
    before = bytes_of(layers.values())
    wanted = peft["init_lora_weights"] == LOFTQ
    originals = {f"{name}.weight": layer.weight.detach() for name, layer in layers.items() if wanted}
    for name, layer in layers.items():
        model.set_submodule(name, _quantized(layer, way, bitsandbytes.nn))
        layers[name] = model.get_submodule(name)
    after, values = bytes_of(layers.values()), sum(layer.in_features * layer.out_features for layer in layers.values())
    print(
        f"{len(layers)} linear layers in {way}: {before / 1e6:.1f} MB of weights before, {after / 1e6:.1f} MB now, "
        f"{8 * after / values:.3f} bits for each weight"
    )
    if uneven:
        print(f"not quantized, since their inputs are no multiple of {_BLOCK}: {', '.join(uneven)}")
    return originals


def _linear_layers(model: nn.Module, in_full: list[str]) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        trains = any(f".{name}.".endswith(f".{other}.") or f".{other}." in f".{name}." for other in in_full)
        if type(module) is nn.Linear and module is not model.get_output_embeddings() and not trains:
            yield name, module


def _quantized(layer: nn.Linear, way: str, bnb: Any) -> nn.Module:
    """The layer in bitsandbytes' form, which quantises its weight when it is moved to a device."""
    weight, sizes = layer.weight.detach(), (layer.in_features, layer.out_features, layer.bias is not None)
    if way == "int8":
        new = bnb.Linear8bitLt(*sizes, has_fp16_weights=False, device="meta")
        new.weight = bnb.Int8Params(weight.cpu(), requires_grad=False)  # on a GPU it would count as quantised
    else:
        new = bnb.Linear4bit(*sizes, compute_dtype=weight.dtype, quant_type=way, device="meta")
        new.weight = bnb.Params4bit(weight, requires_grad=False, quant_type=way, compress_statistics=True, module=new)
        # On some CPUs a forward in eval() would repack the weight for good, in a form that passes no gradients on.
        new.support_avx512bf16_for_cpu = False
    new.bias = layer.bias
    return new.to(weight.device).train(layer.training)


def bytes_of(layers: Any) -> int:
    """Bytes of all that the layers' weights take, constants of quantisation too, each once."""
    tensors = [tensor for layer in layers for tensor in layer.state_dict().values()]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def is_quantized(model: nn.Module) -> bool:
    """Whether `quantize` was here."""
    return next(_packed_layers(model), None) is not None


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a dense copy of the model: dequantised, with the adapter merged, in the dtype of the others."""
    dense = copy.deepcopy(model)
    lora.merge(dense)
    for name, layer in list(_packed_layers(dense)):
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        plain.weight, plain.bias = nn.Parameter(read_weight(layer), False), layer.bias
        dense.set_submodule(name, plain)
    dtype = next(p.dtype for p in model.get_input_embeddings().parameters())
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in dense.state_dict().items()}


def _packed_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and is_packed(module):
            yield name, module


def check(way: str | None, fused_mlp: bool, peft: Settings) -> None:
    """A UserError for what does not go with quantised weights, or without them."""
    if peft["init_lora_weights"] == LOFTQ and not way:
        raise UserError("--init-lora-weights loftq makes up for what --quantize loses: give that, too")
    if way and fused_mlp:
        raise UserError("--fused-mlp computes with dense weights: leave out either it or --quantize")
