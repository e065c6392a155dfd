"""Fine-tunes Phi-3 with LoRA on chat data, in a training loop that you can read and change.

With nothing but pip, on a CPU, in a few minutes: SmolLM2-135M-Instruct in Phi-3's own class learns to
chat as people do in chitchat-dataset.

    python examples/phi3_chat.py

The same code fine-tunes the real thing, which wants a GPU and `pip install datasets`:

    python examples/phi3_chat.py --model microsoft/Phi-3-mini-4k-instruct --bf16 --gradient-checkpointing \\
        --data HuggingFaceH4/ultrachat_200k --data-split train_sft --train-conversations 20000 \\
        --max-seq-length 2048 --learning-rate 2e-4 --max-steps -1 --output-dir phi3-ultrachat

or a model folder of yours on conversations of yours, a JSONL file of {"messages": [...]}:

    python examples/phi3_chat.py --model path/to/folder --data chats.jsonl

Everything that a run makes is in --output-dir: adapter.safetensors, checkpoint-<step>/, metrics.jsonl,
loss.png and replies.jsonl. A run that was stopped goes on with --resume, to the same losses. `--export` writes the
result for others as well: peft (PEFT), portable (vLLM and other servers of adapters), gguf (llama.cpp; see
serve_llama_cpp.py), merged (a plain model folder). `--quantize nf4` is QLoRA: the pretrained linear layers take a
quarter of bfloat16's memory, and the adapter fits the model that is not quantized, too.
"""

import argparse
import random
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from phi3 import (
    chat_data,
    chats,
    checkpoints,
    exporting,
    fused_mlp,
    loop,
    outcome,
    output_dir,
    pretrained,
    quantizing,
    replies,
    report,
    settings,
    starting,
)
from phi3.errors import Diverged, UserError
from phi3.fetch import default_cache_dir
from phi3.settings import Settings
from torch import nn

import lora

# The three dictionaries are the defaults; every key is a flag too (--help says what each one means).
training_config: Settings = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "lr_ratio": None,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "per_device_train_batch_size": 3,
    "per_device_eval_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "max_seq_length": 256,
    "num_train_epochs": 1.0,
    "max_steps": 40,
    "gradient_checkpointing": False,
    "fused_mlp": False,
    "bf16": False,
    "logging_steps": 1,
    "eval_steps": 20,
    "save_steps": 20,
    "save_total_limit": 2,
    "seed": 0,
}

peft_config: Settings = {
    "r": 16,
    "lora_alpha": 32.0,
    "lora_dropout": 0.05,
    "use_rslora": False,
    "use_dora": False,
    "init_lora_weights": True,
    "freeze_A": False,
    "bias": "none",
    "task_type": "CAUSAL_LM",
    "target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "modules_to_save": None,
}

run_config: Settings = {
    "model": pretrained.SMOLLM2,
    "data": chat_data.CHITCHAT,
    "data_split": "train",
    "train_conversations": 1000,
    "eval_conversations": 16,
    "sample_replies": 4,
    "max_new_tokens": 40,
    "quantize": None,
    "attn_implementation": "sdpa",
    "device": "auto",
    "output_dir": "phi3_chat_output",
    "export": None,
    "cache_dir": None,
}


DICTIONARIES = {
    "training (training_config)": training_config,
    "adapter (peft_config)": peft_config,
    "model, data and output (run_config)": run_config,
}


def load_model(run: Settings, training: Settings) -> tuple[nn.Module, Any]:
    """The pretrained model, set up for training, and its tokenizer."""
    device = run["device"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = pretrained.load(
        run["model"],
        cache_of(run),
        dtype=torch.bfloat16 if training["bf16"] else torch.float32,
        attn_implementation=run["attn_implementation"],
    )
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device!r}: {error}") from error
    model.config.use_cache = False  # of no use in training, and at odds with gradient checkpointing
    if training["gradient_checkpointing"]:
        # Not reentrant: the embeddings are frozen, so no input of a layer requires a gradient.
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return model, tokenizer


def cache_of(run: Settings) -> Path:
    return Path(run["cache_dir"]).expanduser() if run["cache_dir"] else default_cache_dir()


def inject(model: nn.Module, peft: Settings) -> None:
    """Swaps the target layers for LoRA layers and prints which."""
    splits = pretrained.fused_splits(model.config, peft["target_modules"])
    try:
        print(lora.inject(model, lora.LoraConfig(**starting.for_inject(peft), splits=splits)))
    except (ValueError, TypeError) as error:
        raise UserError(f"cannot adapt this model: {error}") from error


def train(
    model: nn.Module,
    data: chats.Chats,
    training: Settings,
    folder: Path,
    identity: Settings,
    resume: Path | None,
    engine: loop.Alone,
) -> report.Report:
    """From the start or from a checkpoint to the last step, with measurements and checkpoints on the way."""
    optimizer = loop.make_optimizer(model, training)
    state: dict[str, Any] = {"step": 0, "records": []}
    if resume:
        state = engine.on_main(lambda: checkpoints.read(resume, identity))
        checkpoints.restore(resume, state, model, optimizer, engine)
        print(f"Resuming after step {state['step']} of {resume}")
    total = loop.total_steps(training, data.order.steps_per_epoch)
    engine.on_main(lambda: output_dir.prepare(folder, resume))
    with report.Report(folder, state["records"], total, training["logging_steps"], writes=engine.main) as progress:
        if not resume:
            progress.evaluation(0, loop.held_out_loss(model, data.held_out, engine))
        model.train()
        for step in range(state["step"], total):
            run_step(model, optimizer, data, training, step, total, progress, engine)
            done = step + 1
            if done % training["eval_steps"] == 0 or done == total:
                progress.evaluation(done, loop.held_out_loss(model, data.held_out, engine))
            if done % training["save_steps"] == 0 or done == total:
                keep = training["save_total_limit"]
                checkpoints.save(folder, done, model, optimizer, identity, progress.records, keep, engine)
    return progress


def run_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: chats.Chats,
    training: Settings,
    step: int,
    total: int,
    progress: report.Report,
    engine: loop.Alone,
) -> None:
    """One step and its place in the report."""
    watch = report.Stopwatch()
    micro_batches = [batch.to(model.device) for batch in data.order.step(step)]
    lr = loop.learning_rate_at(step, total, training)
    try:
        result = loop.train_step(model, optimizer, micro_batches, lr, training["max_grad_norm"], engine)
    except Diverged as error:
        progress.draw()
        raise Diverged(f"step {step + 1}: {error} (learning rate {lr:.1e})") from error
    progress.step(step + 1, result, watch.seconds)


def make_parser(description: str) -> argparse.ArgumentParser:
    """The flags: one for each key of the dictionaries, and the two that say what to do with an old run."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for title, defaults in DICTIONARIES.items():
        settings.add_flags(parser, title, defaults)
    old_run = parser.add_argument_group("an earlier run")
    old_run.add_argument(
        "--resume",
        nargs="?",
        const="latest",
        metavar="CHECKPOINT",
        help="go on from this checkpoint directory, or from the latest one in --output-dir",
    )
    old_run.add_argument("--overwrite", action="store_true", help="replace a run that is in --output-dir")
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    return make_parser(__doc__).parse_args(argv)


def start_of(flags: argparse.Namespace, folder: Path) -> Path | None:
    """The checkpoint to go on from, or None; a UserError if an earlier run would be lost."""
    resume = checkpoints.find(flags.resume, folder) if flags.resume else None
    output_dir.check(folder, resume, flags.overwrite)
    return resume


def prepare(
    training: Settings, peft: Settings, general: Settings, engine: loop.Alone
) -> tuple[nn.Module, Any, chats.Chats, Settings]:
    """The model with its adapter, its tokenizer, the data, and what a checkpoint has to agree with."""
    random.seed(training["seed"])
    torch.manual_seed(training["seed"])
    conversations = chat_data.read(general["data"], general["data_split"], cache_of(general))
    model, tokenizer = load_model(general, training)
    data = chats.prepare(conversations, tokenizer, general, training, model.device, engine.rank, engine.ranks)
    identity = checkpoints.identity(pretrained.fingerprint(model), data.fingerprint, training, peft)
    if general["quantize"]:
        identity |= {"quantize": general["quantize"]}
    originals = quantizing.quantize(model, general["quantize"], peft)
    inject(model, peft)
    starting.start(model, peft, data, originals)
    exporting.check(model, general["export"] or [])  # should not be found out after hours of training
    if training["fused_mlp"]:
        fused_mlp.fuse(model)
    return model, tokenizer, data, identity


def run(flags: argparse.Namespace, engine: loop.Alone = loop.ALONE) -> None:
    """From the flags to the files in the output directory."""
    training, peft, general = (settings.chosen(flags, defaults) for defaults in DICTIONARIES.values())
    folder = Path(general["output_dir"]).expanduser()
    resume = engine.on_main(lambda: start_of(flags, folder))
    quantizing.check(general["quantize"], training["fused_mlp"], peft)
    model, tokenizer, data, identity = engine.together(lambda: prepare(training, peft, general, engine))
    engine.shard(model, training["seed"])

    def answers() -> list[str]:
        length, batch_size = general["max_new_tokens"], training["per_device_eval_batch_size"]
        return replies.replies(model, tokenizer, data.prompts, length, batch_size)

    # Nothing is trained or resumed yet, but an adapter may have begun from something. What trains in full has not, and
    # where it is sharded, it could not be swapped.
    with nullcontext() if engine.sharded and peft["modules_to_save"] else lora.disabled(model):
        before = answers()
    for prompt, first in zip(data.prompts, before, strict=True):
        print(replies.show(prompt, {"before": first}))
    print()
    progress = train(model, data, training, folder, identity, resume, engine)
    checkpoints.save_adapter(model, folder / checkpoints.ADAPTER, engine)
    after = answers()
    for prompt, first, second in zip(data.prompts, before, after, strict=True):
        print(replies.show(prompt, {"before": first, "after": second}))
    if engine.main:
        replies.write(folder, data.prompts, before, after)
        outcome.summarize(progress)
    engine.on_main(lambda: export(model, tokenizer, general, training, folder, engine))


def export(
    model: nn.Module, tokenizer: Any, general: Settings, training: Settings, folder: Path, engine: loop.Alone
) -> None:
    """What --export asks for; if no process holds all of the model, from one that is loaded again."""
    wanted = general["export"] or []
    if wanted and engine.sharded:
        model, tokenizer = load_model(general, training)
        lora.load_adapter(model, folder / checkpoints.ADAPTER)
    exporting.export(model, tokenizer, folder, wanted)


def main(argv: list[str] | None = None) -> int:
    """Runs the example; 0 if all went well, 2 for a mistake in what it was given, 1 for a diverged loss."""
    flags = argparse.Namespace()
    try:
        flags = parse(argv)
        run(flags)
    except (UserError, Diverged, KeyboardInterrupt) as error:
        return outcome.explain(error, flags)
    return 0


if __name__ == "__main__":
    sys.exit(main())
