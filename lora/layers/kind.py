"""What a kind of layer says of itself, and what has a default that suits most."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor

from lora.errors import instance
from lora.layers import weights
from lora.layers.cache import Cached
from lora.layers.code import Needs
from lora.layers.registry import Kind, enter
from lora.layers.starts import Init
from lora.layers.switch import Switch

Shape = tuple[int, ...]


class Scaling:
    """`layer.scaling`: loralib's word for `lora_scaling`, unless the base layer has a `scaling` of its own."""

    def __get__(self, layer: Any, owner: type | None = None) -> Any:
        if layer is None:
            return self
        if self.is_taken(layer):  # by a parameter, buffer or module: what torch looks for last
            raise AttributeError("scaling")
        return layer.lora_scaling

    def is_taken(self, layer: nn.Module) -> bool:
        """Whether the layer itself has a `scaling`."""
        own = vars(layer)  # without the dicts that `nn.Module.__init__` makes, if it has not run yet
        dicts = [own.get(kind, {}) for kind in ("_parameters", "_buffers", "_modules")]
        return any("scaling" in names for names in (own, *dicts))


@dataclass(eq=False)
class Place:
    """What the parents of an injected layer know of it (`lora.models.model`)."""

    adapted: bool = True


class LayerKind(nn.Module):
    """The part of `lora.LoRALayer` that kinds of layer define or change."""

    # Class-level defaults: torch's constructors call `reset_parameters` before ours has set anything.
    r: int = 0
    lora_alpha: float = 1
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    merge_weights: bool = False
    init_lora_weights: Init = True
    lora_scaling: float = 1.0
    scaling: ClassVar[Any] = Scaling()
    #: The open blocks of `lora.disabled` that name the layer; `lora_is_off` says what that means for the caller.
    lora_disabled: Switch | None = None
    lora_start: tuple[Tensor, Tensor, float] | None = None
    lora_base_written: bool = True
    lora_needs_data: str | None = None
    lora_injected: bool = False
    #: How often A and B had been written when they started; None if that would not tell what they learn (a file's).
    lora_fresh: int | None = None
    lora_place: Place | None = None
    #: The layer with each of several adapters, by its name, for a layer that has several (`lora.bank`).
    lora_seats: Mapping[str, Any] = MappingProxyType({})
    _merged: Cached | None = None
    _squares: Cached | None = None
    _norms: Cached | None = None
    _subclassed: bool = False
    #: Whether W takes the place of the weight in a forward that the base class has of its own.
    _in_place: bool = False
    #: What a check has found, which holds until the layer's tensors are cast or moved.
    _checked: Any = None

    weight: Tensor
    bias: Any
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_magnitude: nn.Parameter

    #: The arguments that define the adapter: what a checkpoint records and `eject` removes.
    lora_settings: ClassVar[tuple[str, ...]] = (
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "use_dora",
        "merge_weights",
    )
    #: Which dimension of lora_A, and which of lora_B, counts the ranks.
    lora_rank_dims: ClassVar[tuple[int, int]] = 0, 1
    #: The factor that is zero at the start.
    lora_starts_at_zero: ClassVar[str] = "lora_B"
    #: The class that this one adapts; `lora.LoRALayer` for a class that stands in front of LoRA layers.
    lora_base_class: ClassVar[type[nn.Module]] = nn.Module
    #: Whether `lora_forward_with` may stand in for the base class's own forward.
    lora_dense: ClassVar[bool] = False
    #: What the base class's own forward needs of W.
    lora_needs: ClassVar[Needs] = Needs()
    #: Which torch functions of W a base class's own forward may call without W being built: the names of the methods
    #: that compute them beside W₀, each with a `LowRankWeight` before the function's arguments.
    lora_taught: ClassVar[Mapping[Any, str]] = {}
    #: What stands for W there: `LowRankWeight`, or a class that derives from it.
    lora_value: ClassVar[type[Any]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "lora_base_class" not in vars(cls):
            bases = (base for base in cls.__mro__ if issubclass(base, nn.Module) and not issubclass(base, LayerKind))
            cls.lora_base_class = next(bases)
        enter(cls)

    @classmethod
    def lora_shapes(cls, base: nn.Module, r: int, **settings: Any) -> tuple[Shape, Shape]:
        """The shapes of lora_A and lora_B for `base`; ValueError where the kind's own settings do not fit it."""
        raise NotImplementedError(f"{cls.__name__} must define lora_shapes")

    def lora_down(self, x: Tensor, A: Tensor) -> Tensor:
        """x → A x."""
        raise NotImplementedError(f"{type(self).__name__} must define lora_down")

    def lora_up(self, h: Tensor, B: Tensor) -> Tensor:
        """h → B h, in the shape of the layer's output."""
        raise NotImplementedError(f"{type(self).__name__} must define lora_up")

    def lora_delta(self, A: Tensor, B: Tensor) -> Tensor:
        """B A in the shape of the base weight."""
        raise NotImplementedError(f"{type(self).__name__} must define lora_delta")

    def lora_forward_with(self, input: Tensor, weight: Tensor) -> Tensor:
        """The base layer's function of `input` with `weight` in the place of its own; needed if `lora_dense`."""
        raise NotImplementedError(f"{type(self).__name__} must define lora_forward_with")

    # For DoRA, and for starts that go by the base weight; a kind that does not say these has neither.

    @classmethod
    def lora_magnitudes(cls, base: nn.Module, shape_B: Shape) -> int:
        """How many outputs have a magnitude, by the base layer and the shape of B; 0 if the kind has no DoRA."""
        return 0

    def lora_output_dims(self) -> tuple[int, int]:
        """Which dimension of the weight, and which of the output, counts the layer's outputs."""
        raise NotImplementedError(f"{type(self).__name__} must define lora_output_dims")

    def lora_block_rows(self) -> list[int]:
        """How many rows of B belong to each block of the update, of which each is a matrix of its own rank."""
        raise ValueError(f"the kind {type(self).__name__} does not say of what blocks its update is made.")

    # What has a default that suits most.

    @classmethod
    def lora_configure(cls, base: nn.Module, **wanted: Any) -> tuple[Kind, dict[str, Any]]:
        """The kind and its own settings for `base`, from the fields of a LoraConfig that only some kinds know."""
        if wanted["splits"] is not None or wanted["enable_lora"] is not None:
            raise ValueError(f"`splits` and `enable_lora` are for linear layers, not for {instance(base)}.")
        return cls, {}

    def lora_flat(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """A and B, or their like, as matrices: of all blocks A, one below the other, and so of all B; views."""
        return A.flatten(1), B.flatten(1)  # (blocks · q, columns), (all rows, q)

    def lora_formed(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """What `lora_flat` gives, of any rank, in the shapes of the layer's own A and B."""
        return A.reshape(-1, *self.lora_A.shape[1:]), B.reshape(*B.shape, *self.lora_B.shape[2:])

    def lora_block_rank(self) -> int:
        """q, the rank that each block has."""
        return self.lora_B.shape[self.lora_rank_dims[1]]

    def lora_shapes_without_rank(self) -> tuple[Shape, Shape]:
        """The sizes of A and of B, but for those that go with the rank: alike for adapters of one base weight."""
        pairs = zip((self.lora_A, self.lora_B), self.lora_rank_dims, strict=True)
        sizes_A, sizes_B = ((*tensor.shape[:dim], *tensor.shape[dim + 1 :]) for tensor, dim in pairs)
        return sizes_A, sizes_B

    def lora_weight_blocks(self, weight: Tensor) -> Sequence[Tensor]:
        """The blocks of something in the shape of the weight, each (rows, columns) as a block of B A is."""
        return torch.split(weight.flatten(1), self.lora_block_rows())

    def lora_expand_to_outputs(self, adapted: Tensor, other: float = 0.0) -> Tensor:
        """Values for all outputs, from those for outputs that have a magnitude, and one for all others."""
        return adapted

    def lora_not_in_weight(self) -> str | None:
        """What of the merged layer's function its weight alone cannot say; None if nothing."""
        return None

    def lora_base_weight(self) -> Tensor:
        """W₀, dense, as the base layer's function uses it."""
        # The fast path: DoRA asks in every forward.
        if (self.lora_dense or self._in_place) and type(self.weight) in (Tensor, nn.Parameter):
            return self.weight
        return weights.read_weight(self)

    def lora_write_base(self, weight: Tensor) -> None:
        """Give the base layer another weight: copied, or quantised as the one that is there."""
        weights.write_weight(self, weight)

    def lora_weight_shape(self) -> Shape:
        """The shape of W₀, dense."""
        return tuple(self.weight.shape)

    def lora_single(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """The same update by one A and one B, as a linear layer, an embedding or a factored convolution has it."""
        return A, B

    def reset_lora_parameters(self) -> None:
        """A ~ kaiming uniform (a = √5), B = 0, so that training starts from the base layer's function."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def lora_product(self, input: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """B A x."""
        return self.lora_up(self.lora_down(input, A), B)

    def lora_sampled(self, weight: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        """A part of a weight, small where that is quick, and the part of A that goes with it in `lora_delta`."""
        return weight, A

    def lora_add_update(self, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Add s · B A to `weight`, in place."""
        return weight.add_(self.lora_delta(A, B), alpha=self.lora_scaling)
