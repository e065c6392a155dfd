"""Layers whose parents read their weight and never call them: LoRA in them would do nothing, silently."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn as nn


class Bypass(NamedTuple):
    """The children that a class of module bypasses, and what a user can do about it."""

    children: tuple[str, ...]
    way_out: str = "leave it out with `exclude_modules`"
    only_on_fast_path: bool = False


_SSM = Bypass(("conv1d", "out_proj"))

# By full name, so that packages need not be installed; their subclasses count as well.
_BYPASSES = {
    "torch.nn.modules.activation.MultiheadAttention": Bypass(("out_proj",)),
    "torch.nn.modules.transformer.TransformerEncoderLayer": Bypass(
        ("linear1", "linear2"),
        "leave it out, or call torch.backends.mha.set_fastpath_enabled(False) first",
        only_on_fast_path=True,
    ),
    "transformers.models.wavlm.modeling_wavlm.WavLMAttention": Bypass(("q_proj", "k_proj", "v_proj", "out_proj")),
    "transformers.models.mamba.modeling_mamba.MambaMixer": Bypass(("conv1d", "x_proj", "dt_proj", "out_proj")),
    "transformers.models.falcon_mamba.modeling_falcon_mamba.FalconMambaMixer": Bypass(
        ("conv1d", "x_proj", "dt_proj", "out_proj")
    ),
    "transformers.models.jamba.modeling_jamba.JambaMambaMixer": Bypass(("conv1d", "dt_proj")),
    "transformers.models.mamba2.modeling_mamba2.Mamba2Mixer": _SSM,
    "transformers.models.bamba.modeling_bamba.BambaMixer": _SSM,
    "transformers.models.zamba.modeling_zamba.ZambaMambaMixer": Bypass(("conv1d",)),
    "transformers.models.zamba2.modeling_zamba2.Zamba2MambaMixer": _SSM,
    "transformers.models.falcon_h1.modeling_falcon_h1.FalconH1Mixer": _SSM,
    "transformers.models.granitemoehybrid.modeling_granitemoehybrid.GraniteMoeHybridMambaLayer": _SSM,
    "transformers.models.nemotron_h.modeling_nemotron_h.NemotronHMamba2Mixer": _SSM,
}


def bypass_of(parent: nn.Module, child: str) -> str | None:
    """The reason why LoRA in this child of `parent` would do nothing; None if it would do what it should."""
    for owner in type(parent).__mro__:
        bypass = _BYPASSES.get(f"{owner.__module__}.{owner.__qualname__}")
        if bypass and child in bypass.children:
            if bypass.only_on_fast_path and not torch.backends.mha.get_fastpath_enabled():
                return None
            return f"its parent, a {owner.__name__}, reads its weight and bypasses its forward; {bypass.way_out}."
    return None
