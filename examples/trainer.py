"""transformers' Trainer, and those made from it, with checkpoints that hold the adapter alone.

A checkpoint of Trainer's own holds the whole base model, with A and B beside it, and loads as the plain base. With
`AdapterCheckpoints` in front, one holds `adapter.safetensors` in the place of that, from which training resumes bit for
bit, with a base in any dtype, in NF4 or in int8:

    from trainer import Trainer  # this file, copied beside yours

    model = AutoModelForCausalLM.from_pretrained(...)
    lora.inject(model, target_modules="all-linear", r=16)
    Trainer(model=model, args=TrainingArguments("run", load_best_model_at_end=True, ...), ...).train()
    lora.load_adapter(AutoModelForCausalLM.from_pretrained(...), "run/checkpoint-100")

For a trainer of another package: `class SFTTrainer(AdapterCheckpoints, trl.SFTTrainer): pass`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers

import lora


class AdapterCheckpoints:
    """What goes in front of a trainer. Models that FSDP or DeepSpeed shard keep the trainer's own checkpoints."""

    def __init__(self, model: Any = None, *args: Any, **kwargs: Any) -> None:
        with known_as_adapted(model):
            super().__init__(model, *args, **kwargs)

    def _save(self: Any, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder = self.args.output_dir if output_dir is None else output_dir
            os.makedirs(folder, exist_ok=True)
            lora.save_adapter(self.model, os.path.join(folder, "adapter.safetensors"))
            processor = self.processing_class or getattr(self.data_collator, "tokenizer", None)
            if processor is not None:
                processor.save_pretrained(folder)
            torch.save(self.args, os.path.join(folder, "training_args.bin"))

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        else:
            lora.load_adapter(self.model, os.path.join(resume_from_checkpoint, "adapter.safetensors"))

    def _load_best_model(self: Any) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)


class Trainer(AdapterCheckpoints, transformers.Trainer):
    """transformers' own."""


class Reference(torch.nn.Module):
    """The model as it was pretrained, in the memory of the one that trains: a `ref_model` for DPO and its like."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.models = (model,)  # no child: nothing here is to be moved, cast or counted twice
        self.config = getattr(model, "config", None)

    # What a trainer sets as `forward` would compute with this module's own layers, of which it has none.
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model says without LoRA."""
        (model,) = self.models
        with lora.disabled(model):
            return model(*args, **kwargs)


@contextmanager
def known_as_adapted(model: Any) -> Iterator[None]:
    """Tell transformers of adapters in a quantised model, which its Trainer refuses to be given without."""
    # Only while Trainer asks: afterwards `save_pretrained` would look for PEFT's layers. `is_quantized` stays as it is,
    # since `.half()` and `.float()`, which would spoil the model, go by it.
    has_lora = isinstance(model, torch.nn.Module) and any(
        isinstance(module, lora.LoRALayer) for module in model.modules()
    )
    if not has_lora or not getattr(model, "is_quantized", False):
        yield
        return
    model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        del model._hf_peft_config_loaded
