"""`merge`: an adapter written into a model's files, tensor by tensor."""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from lora.adapters import fingerprint
from lora.adapters.adapter import Adapter
from lora.adapters.bare import bare_layer
from lora.adapters.files import kind, open_file, writing
from lora.adapters.rest import describe_tensor, difference
from lora.cli.base import Base, keys_for, open_base, other_files
from lora.cli.options import (
    Subparsers,
    add_check_base,
    add_command,
    add_json,
    add_overwrite,
    check_output,
    path_argument,
    print_json,
    read,
)
from lora.cli.shards import mapped, rewrite
from lora.cli.tied import tied_problems
from lora.errors import AdapterError, join, raise_all
from lora.layers.layer import LoRALayer
from lora.models.merging import MergedModule, MergeReport, rounding_lost

_MERGED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SHOWN = 5  # names of files in an error


def add(commands: Subparsers) -> None:
    """Enter the command."""
    about = "write an adapter into a model's safetensors files, with a few tensors in memory at a time"
    parser = add_command(commands, run, "merge", about, "merge Phi-3-mini-4k-instruct adapter.safetensors merged")
    parser.add_argument(
        "base", type=path_argument, metavar="BASE", help="a folder with model.safetensors, or with shards"
    )
    parser.add_argument("adapter", type=path_argument, metavar="ADAPTER", help="an adapter in any format")
    parser.add_argument("out", type=path_argument, metavar="OUT", help="the folder to write")
    add_check_base(parser)
    add_json(parser)
    add_overwrite(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write a model folder with the adapter merged."""
    base, out = open_base(arguments.base), arguments.out
    check_output(out, arguments.overwrite, [arguments.base, arguments.adapter], "folder")
    if Path(os.path.realpath(arguments.base)) in Path(os.path.realpath(out)).parents:
        raise ValueError(f"{out} must not be in {arguments.base}.")
    _check_replaced(out)
    adapter = read(arguments.adapter)
    merging = Merging(base, adapter, arguments.check_base)
    copied, left_out = other_files(base)
    for path in copied:  # before anything is written
        open_file(base.folder / path).close()
    with whole_folder(out) as folder:
        merging.write(folder)
        for path in copied:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(base.folder / path, folder / path)
    report = merging.report()
    if arguments.json:
        modules = [vars(module) for module in report.modules]
        files = {"copied": [path.as_posix() for path in copied], "left_out": [path.as_posix() for path in left_out]}
        print_json({"modules": modules, "lost": report.lost, "replaced": [*merging.full], **files})
        return 0
    print(report)
    for key in merging.full:
        print(f"replaced: {key}, which the adapter holds in full")
    for path in left_out:
        print(f"not copied: {path}, which holds other weights than the merged ones")
    print(f"{out}: {len(base.shards)} safetensors and {len(copied)} other files")
    return 0


def _check_replaced(out: Path) -> None:
    """FileExistsError if the folder at `out` is neither a model's nor empty."""
    with writing(out):
        found = sorted(path.name for path in out.iterdir()) if kind(out) else []
    if found and "config.json" not in found and not any(name.endswith(".safetensors") for name in found):
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise FileExistsError(
            f"{out} is not replaced: it is no model's folder, having neither config.json nor a safetensors file. "
            f"It holds {', '.join(found[:_SHOWN])}{more}."
        )


class Merging:
    """An adapter that fits a base model; AdapterError that lists everything that does not."""

    def __init__(self, base: Base, adapter: Adapter, check_base: bool) -> None:
        self.base, self.adapter = base, adapter
        self.layers: dict[str, tuple[str, LoRALayer]] = {}  # by the base's key: a module's name and its layer
        self._lost: dict[str, MergedModule] = {}
        weights = {join(name, "weight"): name for name in adapter.modules}
        keys, problems = keys_for(dict.fromkeys((*weights, *adapter.trained_in_full)), base, adapter.rest)
        self.full = {keys[name]: adapter.tensors[name] for name in adapter.trained_in_full if name in keys}
        for weight, name in weights.items():
            if weight in keys:
                try:
                    self.layers[keys[weight]] = name, self._layer(name, keys[weight], check_base)
                except ValueError as error:
                    problems.append(f"{name}: {error}")
        problems += (problem for key in self.full for problem in self._full_problems(key))
        if check_base and not problems:
            problems += self._rest_problems(keys)
        adapted = [(keys.get(weight) or weight).rpartition(".")[0] for weight in weights]
        problems += tied_problems(base, adapted, self.full)
        raise_all(f"{base.folder} and the adapter are not merged", problems, AdapterError)

    def _layer(self, name: str, key: str, check_base: bool) -> LoRALayer:
        entry = self.base.entry(key)
        if entry.dtype not in _MERGED:
            raise ValueError(
                f"its base weight is {entry.dtype}, which is quantised or no floating-point number: "
                "merge into the weights that it was made of."
            )
        beyond = self.adapter.modules[name]["base"].get("beyond_weight")
        if beyond:
            raise ValueError(f"weights cannot say that {beyond}; use `lora.merge` on the model.")
        layer = self._bare(name, entry.shape)
        if layer.weight.shape != entry.shape:
            raise ValueError(f"its base weight must have the shape {tuple(layer.weight.shape)}, got {entry.shape}.")
        if check_base and key not in self.full:
            probe = nn.Module()  # of its own, so that what is mapped does not stay so
            probe.weight = nn.Parameter(mapped(self.base.folder / self.base.files[key], entry), False)
            fingerprint.check(self.adapter.modules[name]["base"], probe)
        return layer

    def _bare(self, name: str, shape: tuple[int, ...]) -> LoRALayer:
        """A module's layer; of a linear one whose file does not say which way the weight is stored, as it fits."""
        settings = self.adapter.modules[name]
        base = settings["base"]
        if base["kind"] != "linear" or base.get("fan_in_fan_out", False) is not None:
            return self.adapter.layer(name)
        ways = [{**base, "shape": None, "fan_in_fan_out": transposed} for transposed in (False, True)]
        tensors = *self.adapter.pair(name), self.adapter.magnitude(name)
        layers = [bare_layer({**settings, "base": way}, *tensors) for way in ways]
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
        theirs, ours = self.full[key], self.base.entry(key)
        if theirs.shape != ours.shape:
            yield f"{key} must have the shape {ours.shape}, got {tuple(theirs.shape)}." + (
                " Its rows were resized where the adapter was trained: merge into the resized model."
                if any(key.endswith(name) for name in self.adapter.kept)
                else ""
            )
        if theirs.dtype != ours.dtype and not (theirs.dtype in _MERGED and ours.dtype in _MERGED):
            yield f"{key} must be of dtype {ours.dtype}, got {theirs.dtype}."

    def _rest_problems(self, keys: Mapping[str, str]) -> Iterator[str]:
        """Where the base differs from the one that the adapter was trained in, beside the weights that are adapted.

        Tied weights stand once in a base's files, so that a name may be missing there.
        """
        for name, about in self.adapter.rest.items():
            if name in keys:
                entry = self.base.entry(keys[name])
                tensor = mapped(self.base.folder / self.base.files[keys[name]], entry)
                how = difference(about, describe_tensor(tensor))
                if how:
                    yield f"{keys[name]}: {how}; `check_base=False` merges it all the same."

    def write(self, folder: Path) -> None:
        """Write the base's files with the adapter merged; ValueError if a merged weight would not be finite."""
        for file, entries in self.base.shards.items():
            names = {key for key in (*self.layers, *self.full) if self.base.files[key] == file}
            rewrite(self.base.folder / file, folder / file, entries, self._change, names)

    @torch.no_grad()
    def _change(self, key: str, tensor: Tensor) -> None:
        if key in self.full:
            tensor.copy_(self.full[key])
        if key not in self.layers:
            return
        name, layer = self.layers[key]
        without_values, layer.weight = layer.weight, nn.Parameter(tensor, False)
        lost = rounding_lost(layer)
        layer.merge_into(layer.weight)
        layer.weight = without_values  # the layer stays, the tensor's memory is the next one's
        self._lost[name] = MergedModule(name, str(tensor.dtype).removeprefix("torch."), lost)
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name}: the merged weight would not be finite in {tensor.dtype}.")

    def report(self) -> MergeReport:
        """What rounding lost, in the adapter's order."""
        return MergeReport(tuple(self._lost[name] for name in self.adapter.modules))


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to fill, which takes its place, and that of what is there, if nothing is raised."""
    real = Path(os.path.realpath(out))
    beside, old = (real.with_name(f".{real.name[:24]}.{secrets.token_hex(8)}.{end}") for end in ("tmp", "old"))
    with writing(out):
        beside.mkdir()
        try:
            yield beside
            if not real.exists():
                os.replace(beside, real)
                return
            os.replace(real, old)
            try:
                os.replace(beside, real)
            except BaseException:
                os.replace(old, real)
                raise
            try:
                shutil.rmtree(old)
            except OSError as error:
                raise OSError(f"{out} is written; what it held is in {old}, not removed: {error.strerror}.") from None
        finally:
            shutil.rmtree(beside, ignore_errors=True)
