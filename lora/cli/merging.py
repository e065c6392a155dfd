"""`merge`: an adapter written into a model's files, tensor by tensor."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from lora.adapters.adapter import Adapter
from lora.adapters.base import describe_tensor, difference
from lora.adapters.formats import FORMATS
from lora.adapters.paths import open_file
from lora.cli import Subparsers, add_adapter, add_command, check_output, dtype_word, path_argument, read, show
from lora.cli.folder import (
    ModelFolder,
    check_replaced,
    keys_for,
    open_folder,
    other_files,
    rewrite,
    tied_problems,
    whole_folder,
)
from lora.errors import AdapterError, Problems
from lora.layers.layer import LoRALayer
from lora.models.merging import MergedModule, MergeReport, rounding_lost

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of weights that can be merged into


def add(commands: Subparsers) -> None:
    """Enter the command."""
    about = "merge an adapter into a model's safetensors files, with few tensors in memory at a time"
    example = "merge Phi-3-mini-4k-instruct adapter.safetensors merged"
    parser = add_command(commands, run, "merge", about, example, "--no-check-base", "--json", "--overwrite")
    about = "a folder with model.safetensors, or with shards and an index"
    parser.add_argument("base", type=path_argument, metavar="BASE", help=about)
    add_adapter(parser, "adapter", "ADAPTER")
    parser.add_argument("out", type=path_argument, metavar="OUT", help="the folder to write")


def run(arguments: argparse.Namespace) -> int:
    """Write a model folder with the adapter merged."""
    model, out = open_folder(arguments.base), arguments.out
    check_output(out, arguments.overwrite, [arguments.base, arguments.adapter], "folder")
    if Path(os.path.realpath(arguments.base)) in Path(os.path.realpath(out)).parents:
        raise ValueError(f"{out} must not be in {arguments.base}.")
    check_replaced(out)
    adapter = read(arguments.adapter)
    if unknown := FORMATS[adapter.format].only_model:
        raise AdapterError(
            f"merge: nothing was written: only its model knows {unknown}; load {arguments.adapter} in Python "
            "(`lora.load_adapter(model, path)`), and use `lora.merge(model)`."
        )
    merge = FolderMerge(model, adapter, arguments.check_base)
    copied, left_out = other_files(model)
    for path in copied:  # before anything is written
        open_file(model.path / path).close()
    with whole_folder(out) as folder:
        merge.write(folder)
        for path in copied:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(model.path / path, folder / path)
    report = merge.report()
    found = {
        "modules": [vars(module) for module in report.modules],
        "lost": report.lost,
        "replaced": [*merge.full],
        "copied": [path.as_posix() for path in copied],
        "left_out": [path.as_posix() for path in left_out],
    }
    lines = str(report).split("\n")
    lines += [f"replaced: {key}, which the adapter holds in full" for key in merge.full]
    lines += [f"not copied: {path}, which holds other weights than the merged ones" for path in left_out]
    lines.append(f"{out}: {len(model.shards)} safetensors and {len(copied)} other files")
    show(found, lines, arguments.json)
    return 0


class FolderMerge:
    """The merge of an adapter into a model's files; AdapterError that lists everything that does not fit."""

    def __init__(self, model: ModelFolder, adapter: Adapter, check_base: bool) -> None:
        self.model, self.adapter = model, adapter
        self.layers: dict[str, tuple[str, LoRALayer]] = {}  # by the model's key: a module's name and its layer
        self._lost: dict[str, MergedModule] = {}
        weights = {about.base.weight_name(name): name for name, about in adapter.modules.items()}
        with Problems("merge: nothing was written", AdapterError) as problems:
            keys, missing = keys_for(dict.fromkeys((*weights, *adapter.trained_in_full)), model, adapter.rest)
            problems.add(*missing)
            self._kept = {keys[name] for name in adapter.kept if name in keys}
            self.full = {keys[name]: adapter.tensors[name] for name in adapter.trained_in_full if name in keys}
            for weight, name in weights.items():
                if weight in keys:
                    with problems.at(name):
                        self.layers[keys[weight]] = name, self._layer(name, keys[weight], check_base)
            problems.add(*(problem for key in self.full for problem in self._full_problems(key)))
            if check_base and not problems:
                problems.add(*self._rest_problems(keys))
            adapted = [(keys.get(weight) or weight).rpartition(".")[0] for weight in weights]
            problems.add(*tied_problems(model, adapted, self.full))

    def _layer(self, name: str, key: str, check_base: bool) -> LoRALayer:
        """The module's LoRA layer, without a base weight; ValueError if the one in the files is none for it."""
        entry, base = self.model.entry(key), self.adapter.modules[name].base
        if entry.dtype not in _DTYPES:
            raise ValueError(
                f"its base weight is {entry.dtype}, which is quantised or not floating-point: "
                "merge into the weights that it was made from."
            )
        beyond = base.beyond_weight
        if beyond:
            raise ValueError(f"weights cannot say that {beyond}; use `lora.merge` on the model.")
        layer = self._bare(name, entry.shape)
        if layer.weight.shape != entry.shape:
            raise ValueError(f"its base weight must have the shape {tuple(layer.weight.shape)}, got {entry.shape}.")
        if check_base and key not in self.full:
            probe = nn.Module()  # of its own, so that what is mapped does not stay so
            probe.weight = nn.Parameter(self.model.tensor(key), False)
            base.check(probe)
        return layer

    def _bare(self, name: str, shape: tuple[int, ...]) -> LoRALayer:
        """A module's layer; of a linear one whose file does not say which way the weight is stored, as it fits."""
        module = self.adapter.modules[name]
        base = module.base
        if base.kind != "linear" or base.fan_in_fan_out is not None:
            return self.adapter.layer(name)
        ways = [replace(base, shape=None, fan_in_fan_out=transposed) for transposed in (False, True)]
        tensors = *self.adapter.pair(name), self.adapter.magnitude(name)
        layers = [replace(module, base=way).layer(*tensors) for way in ways]
        fitting = [layer for layer in layers if layer.weight.shape == shape]
        if len(fitting) == 2:
            raise ValueError(
                "cannot know which way its square weight is stored, as nn.Linear's or as transformers' Conv1D's: "
                "load the adapter into the model (`lora.load_adapter`) and use `lora.merge`."
            )
        if not fitting:
            either = " or ".join(str(tuple(layer.weight.shape)) for layer in layers)
            raise ValueError(f"its base weight must have the shape {either}, got {shape}.")
        return fitting[0]

    def _full_problems(self, key: str) -> Iterator[str]:
        theirs, ours = self.full[key], self.model.entry(key)
        if theirs.shape != ours.shape:
            yield f"{key} must have the shape {ours.shape}, got {tuple(theirs.shape)}." + (
                " Its rows were resized where the adapter was trained: merge into the resized model."
                if key in self._kept
                else ""
            )
        if theirs.dtype != ours.dtype and not (theirs.dtype in _DTYPES and ours.dtype in _DTYPES):
            yield f"{key} must be of dtype {ours.dtype}, got {theirs.dtype}."

    def _rest_problems(self, keys: Mapping[str, str]) -> Iterator[str]:
        """Where the model differs from the one that the adapter was trained in, beside the weights that are adapted.

        Tied weights stand once in a model's files, so that a name may be missing there.
        """
        for name, about in self.adapter.rest.items():
            how = difference(about, describe_tensor(self.model.tensor(keys[name]))) if name in keys else None
            if how:
                yield f"{keys[name]}: {how}; `check_base=False` merges it all the same."

    def write(self, folder: Path) -> None:
        """Write the model's files with the adapter merged; ValueError if a merged weight would not be finite."""
        names: dict[str, set[str]] = {file: set() for file in self.model.shards}
        for key in (*self.layers, *self.full):
            names[self.model.files[key]].add(key)
        for file, its in names.items():
            rewrite(self.model, file, folder / file, self._change, its)

    @torch.no_grad()
    def _change(self, key: str, tensor: Tensor) -> None:
        if key in self.full:
            tensor.copy_(self.full[key])
        if key not in self.layers:
            return
        name, layer = self.layers[key]
        without_values, layer.weight = layer.weight, nn.Parameter(tensor, False)
        lost = rounding_lost(layer)
        layer.lora_merge_into(layer.weight)
        layer.weight = without_values  # the layer stays, the tensor's memory is the next one's
        self._lost[name] = MergedModule(name, dtype_word(tensor.dtype), lost)
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name}: the merged weight would not be finite in {tensor.dtype}.")

    def report(self) -> MergeReport:
        """What rounding lost, in the adapter's order."""
        return MergeReport(tuple(self._lost[name] for name in self.adapter.modules))
