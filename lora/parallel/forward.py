"""A tensor-parallel layer's forward, on this rank's own shards: no collective beside those of the base layer.

    column-parallel   y_l = x W_lᵀ + b_l + s · (drop(x) Aᵀ) B_lᵀ              A on every rank, B by its rows
    row-parallel      y = Σ_l x_l W_lᵀ + s · (drop(x_l) A_lᵀ) Bᵀ  + b          A by its columns, B on every rank

Row-parallel ranks sum h = x Aᵀ where they sum y: in the reduction that the base layer needs. Gradients of what every
rank holds are parts of a sum, too; torch adds them up where they are used: in `clip_grad_norm_`, in the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from lora.functional import Lookup, lora_embedding
from lora.functional.fused import without_autocast
from lora.layers.layer import LoRALayer, needs_no_data
from lora.layers.linear import MergedLinearLoRA
from lora.layers.registry import class_for
from lora.layers.replay import Replays, seeded
from lora.parallel.ddp import check_in_step

Dims = dict[str, int | None]
Sizes = dict[str, tuple[str, int]]

_STEP, _STRIDE = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03  # between seeds that follow each other, and those of ranks


class Seeds:
    """Seeds for dropout on which ranks agree, though each has a random state of its own."""

    def __init__(self, mesh: DeviceMesh) -> None:
        own = torch.randint(2**62, (1,)).to(mesh.device_type)
        shared: Any = distribute_tensor(own, mesh, [Replicate()], src_data_rank=0)
        self.key = int(shared.to_local())
        self.count = 0
        self.replays = Replays()

    def next(self) -> int:
        """The next seed; in a forward that activation checkpointing runs again, the one of the first time."""
        return self.key + self.replays.of_this_forward(self._count_on) * _STEP

    def _count_on(self) -> int:
        self.count += 1
        return self.count - 1


class TensorParallel(LoRALayer):
    """In front of a layer's class: each rank computes with its own shards.

    Attributes:
        lora_local: what a rank does.
    """

    lora_base_class = LoRALayer
    lora_checks = (needs_no_data, check_in_step)

    lora_local: LocalForward

    def lora_layer_forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As LoRALayer's, whatever other class is in front of the layer's."""
        return LoRALayer.lora_layer_forward(self, input, *args, **kwargs)

    def lora_forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.lora_local(self, input)

    def lora_magnified(self, y: Tensor) -> Tensor:
        return y  # each rank's part is


class SummedNorms(LoRALayer):
    """In front of the class of a rank's part, which has a part of each norm."""

    lora_base_class = LoRALayer

    lora_local: LocalForward

    def lora_squared_norms(self) -> Tensor:
        squares: Any = super().lora_squared_norms()
        with torch.no_grad(), without_autocast(squares.device):
            summed: Any = DTensor.from_local(squares, self.lora_local.mesh, [Partial()], run_check=False)
            whole: Tensor = summed.full_tensor()
        return whole


class LocalForward:
    """What each rank of a mesh does with a layer: the layer's own forward, as if this rank's part were all of it.

    Attributes:
        dims: by which dimension each of the layer's own tensors is divided; None if every rank holds all of it.
        sums: whether the ranks' outputs are to be added up.
        takes_parts: whether each rank takes a part of the input's last dimension, and not all of it.
        sizes: the layer's attributes that are smaller in a part, and by which tensor's dimension.
    """

    dims: ClassVar[Dims]
    sums: ClassVar[bool]
    takes_parts: ClassVar[bool] = False
    sizes: ClassVar[Sizes]

    def __init__(self, cls: type[LoRALayer], mesh: DeviceMesh) -> None:
        self.part_class = class_for(SummedNorms, cls) if self.sums else cls
        self.mesh = mesh
        self.seeds = Seeds(mesh)

    def placement(self, layer: LoRALayer, own: str) -> Placement:
        """How one of the layer's own tensors is placed."""
        dim = self.dims[own]
        return Replicate() if dim is None else Shard(self._dim(layer, own, dim))

    def __call__(self, layer: LoRALayer, input: Any) -> DTensor:
        """The layer's output, divided by its last dimension, or in parts that are still to be summed."""
        part = self.part_of(layer)
        wanted: Placement = Shard(input.dim() - 1) if self.takes_parts else Replicate()
        if input.placements != (wanted,):  # a DTensor that came as it was, and not as the style was told
            input = input.redistribute(placements=[wanted])
        # Where the input is on every rank, the gradients that the ranks have for it are parts of a sum.
        x = input.to_local() if self.takes_parts else input.to_local(grad_placements=[Partial()])
        with self.dropping(part, x):
            y = self.forward(part, x)
        if part.use_dora:
            y = part.lora_magnified(y)
        placement = Partial() if self.sums else Shard(y.dim() - 1)
        shape = torch.Size((*y.shape[:-1], self.outputs(layer)))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(y, self.mesh, [placement], run_check=False, shape=shape, stride=stride)

    def forward(self, part: Any, x: Tensor) -> Tensor:
        """This rank's part of the output, without magnitudes."""
        y: Tensor = part.lora_forward(x)
        return y

    def outputs(self, layer: Any) -> int:
        """The size of the whole output's last dimension."""
        return int(layer.lora_weight_shape()[layer.lora_output_dims()[0]])

    def part_of(self, layer: LoRALayer) -> Any:
        """This rank's part as a layer by itself."""
        tensors = {own: self._local(parameter) for own, parameter in layer._parameters.items() if parameter is not None}
        if self.sums and "bias" in tensors:  # once in the sum; the others' gradients for it are zero, and there
            tensors["bias"] = tensors["bias"] * float(self.mesh.get_local_rank() == 0)
        smaller = {size: tensors[own].shape[self._dim(layer, own, dim)] for size, (own, dim) in self.sizes.items()}
        part = object.__new__(self.part_class)
        vars(part).update(vars(layer))
        vars(part).update(
            _parameters=tensors | dict.fromkeys(layer._parameters.keys() - tensors.keys()),
            _squares=None,
            _norms=None,
            **smaller,
        )
        return part

    @contextmanager
    def dropping(self, part: LoRALayer, x: Tensor) -> Iterator[None]:
        """A context in which dropout draws alike where ranks have the same features, and apart where they have not."""
        # In a compiled graph each rank has masks of its own; the outputs' expectation is the same.
        if not part.lora_dropout or not part.training or torch.compiler.is_compiling():
            yield
            return
        seed = self.seeds.next() + (self.mesh.get_local_rank() * _STRIDE if self.sums else 0)
        with seeded(seed, x.device):
            yield

    def _local(self, parameter: Any) -> Tensor:
        whole = parameter.placements[0].is_replicate()  # the ranks' gradients for it are parts of a sum
        part: Tensor = parameter.to_local(grad_placements=[Partial()]) if whole else parameter.to_local()
        return part

    def _dim(self, layer: LoRALayer, own: str, dim: int) -> int:
        return 1 - dim if own == "weight" and getattr(layer, "fan_in_fan_out", False) else dim


class ColwiseLinear(LocalForward):
    """Outputs are divided; the input and A are on every rank."""

    dims: ClassVar[Dims] = {"weight": 0, "bias": 0, "lora_A": None, "lora_B": 0, "lora_magnitude": 0}
    sums = False
    sizes: ClassVar[Sizes] = {"out_features": ("weight", 0)}

    def part_of(self, layer: LoRALayer) -> Any:
        part = super().part_of(layer)
        if isinstance(layer, MergedLinearLoRA):
            vars(part)["splits"] = tuple(size // self.mesh.size() for size in layer.splits)
        return part


class RowwiseLinear(LocalForward):
    """Inputs are divided, and outputs summed; B is on every rank."""

    takes_parts = True

    dims: ClassVar[Dims] = {"weight": 1, "bias": None, "lora_A": 1, "lora_B": None, "lora_magnitude": None}
    sums = True
    sizes: ClassVar[Sizes] = {"in_features": ("weight", 1)}


class ColwiseEmbedding(LocalForward):
    """The embeddings' dimensions are divided; A is on every rank."""

    dims: ClassVar[Dims] = {"weight": 1, "lora_A": None, "lora_B": 0, "lora_magnitude": 0}
    sums = False
    sizes: ClassVar[Sizes] = {"embedding_dim": ("weight", 1)}


class RowwiseEmbedding(LocalForward):
    """The vocabulary is divided: each id is looked up by the rank that has it, A and B being on every rank."""

    dims: ClassVar[Dims] = {"weight": 0, "lora_A": None, "lora_B": None, "lora_magnitude": None}
    sums = True
    sizes: ClassVar[Sizes] = {}

    def forward(self, part: Any, x: Tensor) -> Tensor:
        weight = part.weight  # (vocabulary / ranks, embedding_dim)
        first = -(-part.num_embeddings // self.mesh.size()) * self.mesh.get_local_rank()
        mine = (x >= first) & (x < first + len(weight))  # (...)
        rows = torch.where(mine, x - first, 0)
        # The last ranks may own no rows of the vocabulary.
        base = F.embedding(rows, weight) if len(weight) else weight.new_zeros(*x.shape, weight.shape[1])
        how = Lookup(part.padding_idx, part.scale_grad_by_freq, part.sparse)
        y = lora_embedding(x, base, part.lora_A, part.lora_B, part.lora_scaling, how)  # (..., embedding_dim)
        return torch.where(mine.unsqueeze(-1), y, 0)
