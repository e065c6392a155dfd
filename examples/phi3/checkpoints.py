"""Checkpoints: the adapter and the state of its training, never the pretrained weights."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora
from phi3.errors import UserError, first_line
from phi3.loop import ALONE, Alone
from phi3.settings import Settings

ADAPTER, STATE = "adapter.safetensors", "trainer_state.pt"

# Settings that may differ when a run goes on: they say how long it is and what is written down about it.
_FREE = {"max_steps", "num_train_epochs", "logging_steps", "eval_steps", "save_steps", "save_total_limit"}
_FREE |= {"per_device_eval_batch_size"}


def steps_in(output_dir: Path) -> dict[int, Path]:
    """The checkpoints in a directory by their step, in rising order."""
    found = {}
    for path in output_dir.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdecimal():
            found[int(number)] = path
    return dict(sorted(found.items()))


def identity(model_weights: str, training_data: str, training_config: Settings, peft_config: Settings) -> Settings:
    """What has to be the same for a run to continue to the same losses."""
    fixed = {key: value for key, value in training_config.items() if key not in _FREE}
    return {"model weights": model_weights, "training data": training_data, **fixed, **peft_config}


def save(
    output_dir: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    identity: Settings,
    records: list[dict[str, Any]],
    keep: int,
    engine: Alone = ALONE,
) -> None:
    """Writes `checkpoint-<step>` and then removes all but the newest `keep`.

    It is written under another name and renamed, so that a kill leaves no half of one. The same files, however many
    processes share the run.
    """
    final, partial = output_dir / f"checkpoint-{step}", output_dir / f".checkpoint-{step}.partial"
    engine.on_main(lambda: make_anew(partial))
    save_adapter(model, partial / ADAPTER, engine)
    state = {"step": step, "identity": identity, "records": records, "optimizer": optimizer_state(optimizer, engine)}
    first, *others = engine.gathered(random_state())
    if engine.main:
        torch.save(state | first | {"other_ranks": others}, partial / STATE)
        if final.exists():
            discard(final)
        os.replace(partial, final)
        for older in list(steps_in(output_dir).values())[:-keep]:
            discard(older)


def make_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def save_adapter(model: nn.Module, path: Path, engine: Alone) -> None:
    """The adapter, by the main process; the others hand over their parts, if they have some."""
    if engine.main or engine.sharded:
        lora.save_adapter(model, path)


def optimizer_state(optimizer: torch.optim.Optimizer, engine: Alone) -> dict[str, Any]:
    """The optimizer's state dict, of whole tensors."""
    return _mapped(optimizer.state_dict(), optimizer, engine.whole)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], engine: Alone) -> None:
    """Gives the optimizer its parts of such a state dict."""
    optimizer.load_state_dict(_mapped(state, optimizer, engine.part))


def _mapped(
    state: dict[str, Any], optimizer: torch.optim.Optimizer, change: Callable[[Any, Tensor], Any]
) -> dict[str, Any]:
    """A state dict with every value changed that the optimizer keeps of a parameter."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    items = state["state"].items()
    return state | {"state": {n: {key: change(value, parameters[n]) for key, value in of.items()} for n, of in items}}


def random_state() -> dict[str, Any]:
    """Where the random numbers of this process are."""
    return {
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python_rng": random.getstate(),
    }


def discard(checkpoint: Path) -> None:
    """Removes a checkpoint; renames it first, so that a kill leaves no half of one under its name."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed)


def find(wanted: str, output_dir: Path) -> Path:
    """The directory that `--resume` means: "latest", or a checkpoint's own path."""
    if wanted != "latest":
        path = Path(wanted)
    elif there := steps_in(output_dir):
        path = list(there.values())[-1]
    else:
        raise UserError(f"--resume: there is no checkpoint in {str(output_dir)!r}")
    for name in (ADAPTER, STATE):
        if not (path / name).is_file():
            raise UserError(f"--resume: {str(path)!r} is not a checkpoint: it has no {name}")
    return path


def read(path: Path, identity: Settings) -> dict[str, Any]:
    """A checkpoint's state, if it belongs to this very model, data and settings."""
    try:
        state = torch.load(path / STATE, weights_only=True, map_location="cpu")
        before = state["identity"]
    except Exception as error:  # torch.load has no exception of its own for a damaged file
        raise UserError(f"--resume: cannot read {str(path / STATE)!r}: {first_line(error)}") from error
    different = [
        f"  {key}: {before.get(key)!r} there, {identity.get(key)!r} now"
        for key in {**before, **identity}
        if before.get(key) != identity.get(key)
    ]
    if different:
        raise UserError(f"--resume: {str(path)!r} was made with other things:\n" + "\n".join(different))
    return state


def _read_adapter(path: Path) -> lora.Adapter:
    try:
        return lora.read_adapter(path / ADAPTER)
    except (ValueError, OSError) as error:
        raise UserError(f"--resume: cannot read the adapter: {error}") from error


def restore(
    path: Path, state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, engine: Alone = ALONE
) -> None:
    """Puts adapter, optimizer and random numbers back to where they were, these in as many processes."""
    adapter = engine.on_main(lambda: _read_adapter(path))  # the file need not be there for the others
    try:
        lora.load_adapter(model, adapter)
    except ValueError as error:
        raise UserError(f"--resume: the adapter does not fit this model: {error}") from error
    load_optimizer(optimizer, state["optimizer"], engine)
    states = [state, *state.get("other_ranks", [])]
    if engine.process < len(states):
        ours = states[engine.process]
        torch.set_rng_state(ours["torch_rng"])
        if torch.cuda.is_available() and ours["cuda_rng"]:
            torch.cuda.set_rng_state_all(ours["cuda_rng"])
        random.setstate(ours["python_rng"])
