"""How an adapter fits a model: it takes the model's names, forms and dtypes; everything that does not fit is named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn as nn
from torch import Tensor

from lora.adapters.adapter import MAGNITUDE, PARAMETERS, Adapter, Form, ModuleAdapter
from lora.adapters.base import beyond_peft, differences, own_tensors, tied, trained_in_full
from lora.adapters.formats import FORMATS
from lora.adapters.renaming import of_layers, renamed
from lora.errors import AdapterError, Problems, join
from lora.functional.fused import exact_dtype
from lora.layers import weights
from lora.layers.conv import ConvLoRA
from lora.layers.layer import LoRALayer
from lora.layers.linear import MergedLinearLoRA
from lora.layers.parts import tensor_name
from lora.layers.registry import adapted_class, kind_for
from lora.layers.settings import alpha_of, scaling_of
from lora.layers.weights import is_writable
from lora.models.injection import Adaptation
from lora.models.model import Memory, names_of, without_wrappers
from lora.models.parameters import all_parts, part_for
from lora.models.refusals import refusal
from lora.models.start import pretrained_weight, to_start
from lora.models.training import is_kept, originals

_NO_ROOM = "`r` is {} in the file, and the model is prepared for at most {}."
# The share of rows that a resized embedding has in common with the one of the same base model, at least.
_COMMON_ROWS, _NEAR = 0.01, 0.01  # and how near a row is that was rounded
_ROWS = 4096  # that are compared at once
_CAST = {torch.float64, torch.float32, torch.bfloat16, torch.float16}  # dtypes of models that heads follow
_TIED = "are one tied tensor in the model"
_UNTIE = (
    "Untie them first: give each module a Parameter of its own, as in `model.lm_head.weight = "
    "torch.nn.Parameter(model.lm_head.weight.detach().clone())`, and set `model.config.tie_word_embeddings = False`."
)

# A module, the name of one of its own tensors, and a value for it.
Target = tuple[nn.Module, str, Tensor]


class Fit:
    """How an adapter fits a model.

    Attributes:
        adapter: the adapter as the model has it, without what the model holds anyway.
        plans: the layers that must be made first.
        as_before: what the model holds from an adapter before, and this one does not: the values that it had.
        problems: everything that does not fit.
    """

    def __init__(self, model: nn.Module, adapter: Adapter, check_base: bool, what: str) -> None:
        self.model, self.check_base = model, check_base
        self.names = names_of(model)
        if any(settings.base.parameter for settings in adapter.modules.values()):  # of parts that are not there yet
            for owner, parameter in [*all_parts(self.names)]:
                part_for(owner, parameter, self.names)
        self.modules = {without_wrappers(name): module for module, known in self.names.items() for name in known}
        self.plans: list[Adaptation] = []
        self.as_before: list[Target] = []
        self.problems = Problems(what, AdapterError)
        self._injected = [m for m in self.names if isinstance(m, LoRALayer) and m.r > 0]
        self._unchanged: set[str] = set()
        # The shapes of embeddings, which output layers have as well.
        self._vocabularies = {(m.num_embeddings, m.embedding_dim) for m in self.names if isinstance(m, nn.Embedding)}
        adapter = FORMATS.get(adapter.format, FORMATS["lora"]).meant(adapter, self.modules, self.problems)
        self.adapter = self._in_forms(of_layers(renamed(adapter, self.modules, self.problems), self.modules))
        self._in_full, self._kept = {*self.adapter.trained_in_full}, {*self.adapter.kept}
        for name, settings in self.adapter.modules.items():
            with self.problems.at(name):
                self._fit_module(name, settings)
        self._find_unmatched()
        for name in self.adapter.trained_in_full:
            self._fit_full(name)
        self._find_ties()
        if check_base and self.adapter.rest:
            self._compare_rest()
        # What the model has anyway is neither written nor remembered.
        self.adapter = replace(
            self.adapter,
            tensors={name: value for name, value in self.adapter.tensors.items() if name not in self._unchanged},
            trained_in_full=[name for name in self.adapter.trained_in_full if name not in self._unchanged],
            kept=[name for name in self.adapter.kept if name not in self._unchanged],
        )
        written = {*self.adapter.trained_in_full}
        for name, module, own in trained_in_full(self.names, only_recorded=True):
            if name not in written:
                if is_kept(module, own):
                    self.as_before.append((module, own, originals(module)[own]))
                else:
                    self.problems.add(f"{name}: trains in the model, and is not in the file.")

    # ---- modules that are adapted ------------------------------------------------------------------------------

    def _in_forms(self, adapter: Adapter) -> Adapter:
        """The adapter in the forms, ranks and dtypes of the model's layers, where that is exact."""
        settings, tensors, kept = dict(adapter.modules), dict(adapter.tensors), {*adapter.kept}
        for name in [name for name in adapter.modules if name in self.modules]:
            module, pair = self.modules[name], [*adapter.pair(name)]
            with self.problems.at(name):
                settings[name], *pair = _as_in(module, adapter.format, settings[name], *pair)
            if isinstance(module, LoRALayer):
                pair = [*module.lora_padded(settings[name].r, *pair)]
            tensors |= {join(name, own): factor for own, factor in zip(PARAMETERS, pair, strict=True)}
        for key, tensor in () if adapter.format == "lora" else tensors.items():
            target = self._target(key)[2]
            if target is not None and key not in kept:
                tensors[key] = _exactly(tensor, target.dtype)
        return replace(adapter, modules=settings, tensors=tensors)

    def _fit_module(self, name: str, settings: ModuleAdapter) -> None:
        if name not in self.modules:
            raise ValueError("there is no such module in the model.")
        module = self.modules[name]
        if any(tensor.is_meta for tensor in module.parameters()):
            raise ValueError("has no values yet, being on the meta device; give it some first.")
        settings.base.check_kind(module)
        if self._injected:
            self._compare(name, module, settings)
        else:
            self._plan(name, module, settings)
        if self.check_base and tensor_name(module, name, "weight") not in self._in_full:
            settings.base.check(module)

    def _compare(self, name: str, module: nn.Module, settings: ModuleAdapter) -> None:
        if not isinstance(module, LoRALayer) or module.r == 0:
            raise ValueError("has an adapter in the file, and no LoRA in the model.")
        ranks = module.lora_ranks()
        if settings.r > ranks[0] and _has_room(module):
            raise ValueError(_NO_ROOM.format(settings.r, ranks[0]))
        with_dora = bool(settings.use_dora)
        if with_dora != module.use_dora:
            raise ValueError(f"`use_dora` is {with_dora} in the file and {module.use_dora} in the model.")
        for own, parameter in module.lora_parameters():
            self._like(join(name, own), parameter.shape, parameter.dtype)
        if settings.r not in ranks:
            raise ValueError(f"`r` is {settings.r} in the file and {module.r} in the model.")
        if settings.r != module.r:
            alpha_of(settings.scaling, module.r, settings.use_rslora)  # a ValueError if no float gives the scaling
        for option, theirs in settings.form.items():
            ours = getattr(module, option, None)
            if theirs != ours:
                raise ValueError(f"`{option}` is {theirs} in the file and {ours} in the model.")

    def _plan(self, name: str, module: nn.Module, settings: ModuleAdapter) -> None:
        reason = refusal(self.model, self.names[module], module)
        kind = kind_for(type(module))
        if reason or kind is None:
            raise ValueError(reason)
        kind, own = kind.lora_configure(module, **settings.form)
        dtype = self.adapter.tensors[join(name, "lora_A")].dtype
        shapes = dict(zip(PARAMETERS, kind.lora_shapes(module, settings.r, **own), strict=True))
        if settings.use_dora:
            cls = adapted_class(kind, module)
            cls.lora_check_dora(module, shapes["lora_B"])
            shapes[MAGNITUDE] = (cls.lora_magnitudes(module, shapes["lora_B"]),)
        for parameter, shape in shapes.items():
            exact = exact_dtype(dtype) if parameter == MAGNITUDE else dtype
            self._like(join(name, parameter), shape, exact)
        self.plans.append(Adaptation(module, kind, {**settings.general, "adapter_dtype": dtype, **own}))

    def _find_unmatched(self) -> None:
        """Complain of layers and modules that only the model or only the file has, or that the file has twice."""
        names = self.adapter.modules
        for module in self._injected:
            if not any(without_wrappers(name) in names for name in self.names[module]):
                self.problems.add(f"{self.names[module][0]}: has LoRA in the model, and no adapter in the file.")
        for known in self.names.values():
            twins = [name for name in map(without_wrappers, known) if name in names]
            if len(twins) > 1:
                self.problems.add(f"{', '.join(twins)}: one module in the model, and {len(twins)} in the file.")
        absent = [name for name in self.adapter.modules_to_save if name not in self.modules]
        self.problems.add(*(f"{name}: there is no such module in the model." for name in absent))

    # ---- tensors that are held in full -------------------------------------------------------------------------

    def _target(self, name: str) -> tuple[nn.Module, str, Tensor | None]:
        """The module, the own name, and the tensor of the model that a full name stands for."""
        owner, _, own = name.rpartition(".")
        module = self.modules[owner] if owner in self.modules else nn.Module()
        return module, own, module._parameters.get(own, module._buffers.get(own))

    def _fit_full(self, name: str) -> None:
        module, own, tensor = self._target(name)
        if tensor is None:
            self.problems.add(f"{name}: there is no such parameter or buffer in the model.")
        elif not is_writable(tensor):
            self.problems.add(
                f"{name}: the model's tensor cannot be written to, being expanded from a smaller one or made in "
                "torch.inference_mode; make the model otherwise."
            )
        elif name in self._kept:
            self._fit_kept(name, module, own, tensor)
        else:
            value = self.adapter.tensors[name]
            if self.plans and {tensor.dtype, value.dtype} <= _CAST:
                # A plain model says by its dtype in which one everything is to be, a head that trained as well.
                self.adapter.tensors[name] = value.to(tensor.dtype)
            if own == "weight" and self._is_resized(tensor, value) and tensor.shape in self._vocabularies:
                self._complain_of_rows(name, tensor, value)
            else:
                self._like(name, tensor.shape, tensor.dtype)

    def _is_resized(self, tensor: Tensor, value: Tensor) -> bool:
        """Whether only the number of rows differs."""
        return tensor.dim() == value.dim() == 2 and tensor.shape[1:] == value.shape[1:] and len(tensor) != len(value)

    def _complain_of_rows(self, name: str, tensor: Tensor, value: Tensor) -> None:
        self.problems.add(
            f"{name} has the shape {tuple(tensor.shape)} in the model, and {tuple(value.shape)} in the file: the "
            "embeddings were resized where the adapter was trained; call "
            f"`model.resize_token_embeddings({value.shape[0]})` first."
        )

    def _fit_kept(self, name: str, module: nn.Module, own: str, tensor: Tensor) -> None:
        """Fit a part of the base model that did not train: it may be in another dtype, as the base model may."""
        value = self.adapter.tensors[name]
        embeds = own == "weight" and tensor.dim() == value.dim() == 2 and tensor.shape[1] == value.shape[1]
        if own == "weight" and self._is_resized(tensor, value):
            self._complain_of_rows(name, tensor, value)
        elif tensor.is_floating_point() != value.is_floating_point() or tensor.shape != value.shape:
            self._like(name, tensor.shape, tensor.dtype)
        elif embeds and not tensor.is_meta:
            self._fit_rows(name, module, tensor)
        else:
            self.adapter.tensors[name] = value.to(tensor.dtype)

    def _fit_rows(self, name: str, module: nn.Module, tensor: Tensor) -> None:
        """Take from the file only the rows that the model does not have: resizing has added them."""
        start = module.lora_start if isinstance(module, LoRALayer) else None
        ours = tensor if start is None else pretrained_weight(cast(LoRALayer, module))
        ours = weights.of(module, "weight", ours).whole().detach()
        theirs = self.adapter.tensors[name].to(ours.device)
        same, near = _common_rows(ours, theirs)
        self.adapter.tensors[name] = torch.where(same[:, None], ours, theirs.to(ours.dtype))
        if self.check_base and near < _COMMON_ROWS * len(same):
            self.problems.add(
                f"{name}: only {near} of its {len(same)} rows are those of the file, which is for another base model; "
                "`check_base=False` loads it all the same."
            )
        elif bool(same.all()) and "weight" not in originals(module):
            self._unchanged.add(name)
        elif start is not None:
            self.problems.add(
                f"{name}: the file has other rows, and the adapter in the model started from a part of the model's "
                "own; load the file into the plain base model."
            )

    def _find_ties(self) -> None:
        """Complain of tied tensors in the model for which the file has several values, or one of several."""
        adapter, memory = self.adapter, Memory(own_tensors(self.names))
        targets = {name: self._target(name)[2] for name in adapter.trained_in_full}
        wanted = {name: tensor for name, tensor in targets.items() if tensor is not None}
        seen, once = set[str](), set[str]()
        for name, tensor in wanted.items():
            if name in seen:
                continue
            whole = [one for one in memory.sharing(tensor) if one.tensor.shape == tensor.shape]  # no part of another
            group = [n for one in whole for n in one.names]
            ours, apart = [n for n in group if n in wanted], [n for n in group if n in adapter.rest]
            seen.update(ours)
            values = [adapter.tensors[n] for n in ours]
            if not all(torch.equal(values[0], value) for value in values):
                self.problems.add(f"{', '.join(ours)}: {_TIED}, and differ in the file. {_UNTIE}")
            elif apart:
                self.problems.add(
                    f"{', '.join(ours + apart)}: {_TIED}, and the file would change only {', '.join(ours)}. {_UNTIE}"
                )
            else:
                once.update(ours)
        if adapter.format == "peft":
            self.problems.add(*tied(self.names, once - self._kept))

    def _compare_rest(self) -> None:
        held = {id(self._target(name)[2]) for name in self.adapter.trained_in_full}
        adapted = {about.base.weight_name(name) for name, about in self.adapter.modules.items()}
        found = [*differences(self.adapter.rest, self.names, held, adapted)]
        if found:
            self.problems.add(
                *found,
                "The base model differs there from the one that the adapter was trained in. What was made at random, "
                "as a new head is, belongs in the adapter's file: train it with `modules_to_save` or `task_type`. "
                "`check_base=False` loads the adapter all the same.",
            )

    def _like(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        tensor = self.adapter.tensors[name]
        if tensor.shape != shape:
            self.problems.add(f"{name} must have the shape {tuple(shape)}, got {tuple(tensor.shape)}.")
        exact = name.endswith(MAGNITUDE) and torch.promote_types(tensor.dtype, dtype) == dtype
        if tensor.dtype != dtype and not exact:
            self.problems.add(f"{name} must be of dtype {dtype}, got {tensor.dtype}.")


# ---- forms -----------------------------------------------------------------------------------------------------


def _as_in(module: nn.Module, format: str, settings: ModuleAdapter, A: Tensor, B: Tensor) -> Form:
    """A module's adapter in the form of the model's layer, where that is exact; ValueError where it is not."""
    layer = module if isinstance(module, LoRALayer) and module.r > 0 else None
    if layer is not None and layer.lora_start is not None:
        if format != "lora":
            raise ValueError(
                f"its adapter in the model started from a part of the base weight, which a file of format {format!r} "
                "does not know; load it into the plain base model."
            )
        return settings.at_rank(layer.r), *to_start(layer, settings.r, settings.scaling, A, B)
    if format == "loralib":
        return _of_loralib(module, settings, A, B)
    if format == "lora" or settings.splits:
        # Ours has the layer's form, but where `lora.combine` made one pair of an adapter of several splits.
        if settings.splits or not isinstance(layer, MergedLinearLoRA):
            return settings, A, B
    elif settings.base.kind == "conv" and (beyond := beyond_peft(module)):
        raise ValueError(f"PEFT ignores {beyond} when it applies this convolution's update; lora does not.")
    if settings.base.kind == "stack":
        return settings, *_as_stored(module, A, B)
    return (settings, A, B) if layer is None else _of_single(layer, settings, A, B)


def _as_stored(module: nn.Module, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of a stack, from those of an older PEFT, in which A had the other side of matrices that are not square.

    The update of each matrix is the same: B A, or (Aᵀ Bᵀ)ᵀ.
    """
    rows, columns = weights.whole_shape(module.weight)[1:]
    turned = bool(getattr(module, "is_transposed", False))
    sides = (rows, columns) if turned else (columns, rows)  # in, out
    is_other = rows != columns and (A.shape[-1], B.shape[1]) == sides[::-1]
    return (B.mT.contiguous(), A.mT.contiguous()) if is_other else (A, B)


def _of_loralib(module: nn.Module, settings: ModuleAdapter, A: Tensor, B: Tensor) -> Form:
    """What a flat file leaves open, from the module: of convolutions r, of fused layers the splits."""
    kind = type(module) if isinstance(module, LoRALayer) else kind_for(type(module))
    r, known = B.shape[1], dict[str, Any]()
    if kind is not None and issubclass(kind, ConvLoRA):
        kernel: Any = module.kernel_size
        r //= kernel[0] ** (len(kernel) // 2)
        known["factored"] = False
    elif isinstance(module, MergedLinearLoRA) and module.r > 0:
        known |= {"splits": module.splits, "enable_lora": module.enable_lora}
    elif A.shape[0] != r:
        raise ValueError(
            f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} are those of a fused layer, whose splits loralib's "
            "files do not say: adapt the model first, with `enable_lora` and `splits` as in training."
        )
    if r == 0:
        raise ValueError(f"lora_B {tuple(B.shape)} does not fit a kernel of {module.kernel_size}.")
    return replace(settings, **known, r=r, scaling=scaling_of(settings.lora_alpha, r)), A, B


def _of_single(layer: LoRALayer, settings: ModuleAdapter, A: Tensor, B: Tensor) -> Form:
    """The form of a layer, from one pair; ranks that add nothing are left out.

    A merged linear layer gets A for every split, and its own rows of B; a pair that was made of such a layer becomes
    what it was.
    """
    if isinstance(layer, MergedLinearLoRA):
        A, B = _by_split(layer, *_trimmed(layer, A, B, splits=len(layer.lora_slices())))
        return replace(settings.at_rank(B.shape[1]), splits=layer.splits, enable_lora=layer.enable_lora), A, B
    if isinstance(layer, ConvLoRA) and not layer.factored:
        raise ValueError("`factored` is True in the file and False in the model.")
    A, B = _trimmed(layer, A, B, groups=settings.base.groups)
    return settings.at_rank(A.shape[0]), A, B


def _trimmed(layer: LoRALayer, A: Tensor, B: Tensor, *, groups: int = 1, splits: int = 1) -> tuple[Tensor, Tensor]:
    """A single pair at the first rank of the layer's that holds all which adds something; as it is, if it has one.

    Of several splits one pair may have one A for all, or each split's own.
    """
    ours = layer.lora_ranks()
    ranks: Sequence[int] = range(ours[0] * splits, 0, -1) if _has_room(layer) else (layer.r, layer.r * splits)
    if A.shape[0] in ranks:
        return A, B
    rank = A.shape[0] // groups
    rows = A.reshape(groups, rank, *A.shape[1:])
    in_A, in_B = (rows.flatten(2) != 0).any(2).any(0), (B.transpose(0, 1).flatten(1) != 0).any(1)  # (rank)
    for used in (in_A | in_B, in_A & in_B):  # padding goes first: an A whose B is still zero is to be kept
        last = int(used.nonzero().max()) + 1 if used.any() else 0
        reached = next((r // groups for r in ranks if last <= r // groups < rank), None)
        if reached is not None:
            return rows[:, :reached].flatten(0, 1), B[:, :reached]
    if _has_room(layer):
        raise ValueError(_NO_ROOM.format(A.shape[0], ranks[0]))
    raise ValueError(f"`r` is {A.shape[0]} in the file and {ranks[0]} in the model.")


def _by_split(layer: MergedLinearLoRA, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    slices, has_room = layer.lora_slices(), _has_room(layer)
    G = len(slices)
    if B.shape[0] != sum(layer.splits):
        raise ValueError(f"`splits` (={layer.splits}) must add up to the {B.shape[0]} outputs of the file's lora_B.")
    # A block of r for each split; or one A for all, perhaps padded.
    r, rest = divmod(A.shape[0], G) if has_room else (layer.r, 0)
    forms = [(r, r)] if A.shape[0] > r and not rest else []
    for step, rank in [*forms, (0, min(layer.r, A.shape[0]))]:
        blocks = [B[i:j, g * step :][:, :rank] for g, (i, j) in enumerate(slices)]
        if sum(map(torch.count_nonzero, blocks)) == torch.count_nonzero(B):
            return A if step else A[:rank].repeat(G, 1), torch.cat(blocks)
    if has_room and A.shape[0] > layer.r:
        raise ValueError(_NO_ROOM.format(A.shape[0], layer.r))
    raise ValueError("has an update in the file that the model's splits cannot hold: it goes beyond their blocks.")


def _has_room(layer: LoRALayer) -> bool:
    """Whether the layer is prepared for adapters of other ranks."""
    return isinstance(layer.lora_ranks(), range)


def _exactly(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in this dtype, if no value changes."""
    if tensor.dtype == dtype or not (tensor.is_floating_point() and dtype.is_floating_point):
        return tensor
    cast = tensor.to(dtype)
    return cast if torch.equal(cast.to(tensor.dtype), tensor) else tensor


# ---- tensors ---------------------------------------------------------------------------------------------------


def _common_rows(ours: Tensor, theirs: Tensor) -> tuple[Tensor, int]:
    """Which rows are the model's own, and how many are near it, whatever they were rounded to in between."""
    same, near = [], 0
    for start in range(0, len(ours), _ROWS):  # float64 copies of a part alone
        a, b = ours[start : start + _ROWS], theirs[start : start + _ROWS]
        # A row is the model's own if a cast is all that differs, or what float32 loses when a start is given back.
        size, distance = b.double().norm(dim=1), (a.double() - b.double()).norm(dim=1)
        cast_alone = ((a.to(b.dtype) == b) | (b.to(a.dtype) == a)).all(1)
        same.append(cast_alone | (distance <= 16 * torch.finfo(torch.float32).eps * size))
        near += int((distance <= _NEAR * size).sum())
    return torch.cat(same), near
