"""examples/trainer.py: checkpoints of the adapter alone, quantised bases, a reference that is the same model."""

import copy
import os
import unittest.mock
import warnings

import pytest
import torch
import torch.distributed as dist
import transformers
from accelerate.state import AcceleratorState
from phi3.tiny import tokenizer
from safetensors import safe_open
from torch.nn.functional import logsigmoid
from torch.nn.parallel import DistributedDataParallel
from trainer import AdapterCheckpoints, Reference, Trainer, known_as_adapted

import lora

IDS = [(torch.arange(8) * step) % 64 for step in range(1, 13)]
DATA = [{"input_ids": ids, "labels": ids} for ids in IDS]
QUANTISED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"load_in_8bit": True},
}
# What starts in a process anew, from the same seed: settings of `inject`, by the name of a base and of a way to train.
RUNS = {
    "float32": {"lora_dropout": 0.1, "bias": "all", "modules_to_save": ["norm"]},
    "pissa": {"init_lora_weights": "pissa"},
    "nf4": {"lora_dropout": 0.1},
    "int8": {"use_dora": True},
}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path


def pretrained(folder, name="float32"):
    config = {"quantization_config": transformers.BitsAndBytesConfig(**QUANTISED[name])} if name in QUANTISED else {}
    return transformers.LlamaForCausalLM.from_pretrained(folder / "base", **config)


def adapted(folder, name="float32"):
    model = pretrained(folder, name)
    lora.inject(model, target_modules=["q_proj", "down_proj"], r=4, **RUNS[name])
    return model


def trainer_of(model, folder, cls=Trainer, *, best=False, **more):
    by_steps = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "greater_is_better": True}
    args = transformers.TrainingArguments(
        str(folder / "run"),
        use_cpu=True,
        dataloader_pin_memory=False,
        report_to=[],
        disable_tqdm=True,
        per_device_train_batch_size=2,
        max_steps=4,
        save_steps=2,
        learning_rate=1e-2,
        **(by_steps if best else {}),
    )
    return cls(model=model, args=args, train_dataset=DATA, eval_dataset=DATA[:4], **more)


def trained_in(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", RUNS)
def test_training_resumes_bit_for_bit_from_the_adapter_alone_which_a_plain_base_can_load(name, folder):
    whole = trainer_of(adapted(folder, name), folder)
    whole.train()
    checkpoint = folder / "run" / "checkpoint-2"
    assert not any("model" in path.name or path.name == "config.json" for path in checkpoint.iterdir())
    rest = trainer_of(adapted(folder, name), folder)
    rest.train(resume_from_checkpoint=str(checkpoint))
    got, expected = trained_in(rest.model), trained_in(whole.model)
    assert any("lora_B" in own for own in expected)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    plain = pretrained(folder, name)
    lora.load_adapter(plain, folder / "run" / "checkpoint-4")
    ids, close = IDS[2][None], {"rtol": 1e-4, "atol": 1e-5} if name == "pissa" else {"rtol": 0, "atol": 0}
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(ids).logits, whole.model.eval()(ids).logits, **close)


@pytest.mark.parametrize("name", ["float32", pytest.param("nf4", marks=pytest.mark.slow)])
def test_the_best_model_is_there_at_the_end(name, folder):
    trainer = trainer_of(adapted(folder, name), folder, best=True)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[0] > losses[1]  # and the greater is said to be better, for the best not to be the last
    assert trainer.evaluate()["eval_loss"] == losses[0]


def test_what_belongs_to_the_model_is_saved_with_it(folder):
    trainer = trainer_of(adapted(folder), folder, processing_class=tokenizer())
    trainer.save_model()
    assert transformers.AutoTokenizer.from_pretrained(folder / "run").chat_template
    with safe_open(folder / "run" / "adapter.safetensors", "pt") as file:
        assert not any("embed_tokens" in key for key in file.keys())  # noqa: SIM118
    collator = transformers.DataCollatorWithPadding(tokenizer())
    trainer_of(adapted(folder), folder, data_collator=collator).save_model(str(folder / "other"))
    assert transformers.AutoTokenizer.from_pretrained(folder / "other").chat_template


def test_a_process_that_is_not_to_save_writes_nothing(folder, monkeypatch):
    trainer = trainer_of(adapted(folder), folder)
    monkeypatch.setattr(transformers.TrainingArguments, "should_save", False)
    trainer._save(str(folder / "nothing"))
    assert not (folder / "nothing").exists()


@pytest.mark.parametrize("name", QUANTISED)
def test_transformers_own_trainer_refuses_a_quantised_base(name, folder):
    """When this fails, `known_as_adapted` is needed no more."""
    with pytest.raises(ValueError, match="attach trainable adapters"):
        trainer_of(adapted(folder, name), folder, transformers.Trainer)


def test_a_quantised_model_is_what_it_was_when_it_has_a_trainer(folder):
    model = adapted(folder, "nf4")
    before = {*vars(model)}
    trainer_of(model, folder)
    assert {*vars(model)} - before <= {"train", "eval", "forward"}
    assert model.is_quantized
    assert not model._hf_peft_config_loaded


def test_any_trainer_can_be_made_of_a_quantised_model_that_is_known_as_adapted(folder):
    model = adapted(folder, "nf4")
    with known_as_adapted(model):
        trainer = trainer_of(model, folder, transformers.Trainer)
    before = trained_in(model)
    trainer.train()
    assert not any(torch.equal(before[name], now) for name, now in trained_in(model).items() if "lora_B" in name)


def test_a_quantised_base_without_adapters_is_refused_as_ever(folder):
    model = pretrained(folder, "nf4")
    with pytest.raises(ValueError, match="attach trainable adapters"):
        trainer_of(model, folder)
    assert not model._hf_peft_config_loaded


@pytest.mark.parametrize("sharding", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_sharded_models_keep_the_trainers_own_checkpoints(sharding):
    calls = []

    class Own:
        is_fsdp_enabled = is_deepspeed_enabled = False

        def __init__(self, model):
            self.model = model

        def _save(self, *args):
            calls.append(("save", *args))

        def _load_from_checkpoint(self, *args):
            calls.append(("load", *args))

        def _load_best_model(self):
            calls.append(("best",))

    class Sharding(AdapterCheckpoints, Own):
        pass

    setattr(Sharding, sharding, True)
    one = Sharding(torch.nn.Linear(2, 2))
    one._save("folder", {}), one._load_from_checkpoint("folder", one.model), one._load_best_model()
    assert calls == [("save", "folder", {}), ("load", "folder", one.model), ("best",)]


def two_train(folder):
    rank = str(dist.get_rank())
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    with unittest.mock.patch.dict(os.environ, group):
        AcceleratorState._reset_state(True)
        whole, rest = (trainer_of(adapted(folder), folder, best=True) for _ in range(2))
        whole.train()
        assert type(whole.model_wrapped) is DistributedDataParallel
        rest.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
        AcceleratorState._reset_state(True)
    torch.testing.assert_close(trained_in(rest.model), trained_in(whole.model), rtol=0, atol=0)
    return trained_in(whole.model)


@pytest.mark.slow
def test_two_processes_share_checkpoints_and_resume_alike(ranks, folder):
    first, second = ranks.run(two_train, folder)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert len([*(folder / "run").rglob("adapter.safetensors")]) == 2


# ---- the reference of DPO --------------------------------------------------------------------------------------------


def log_probability(model, ids, prompt=3):
    logits = model(input_ids=ids).logits[:, prompt - 1 : -1].log_softmax(-1)  # (2, tokens, vocabulary)
    return logits.gather(-1, ids[:, prompt:, None]).sum((1, 2))  # (2,)


def dpo(model, reference, ids, beta=0.1):
    """−log σ(β · ((log π − log π_ref)(chosen) − (log π − log π_ref)(rejected))), of two rows (arXiv:2305.18290)."""
    with torch.no_grad():
        expected = log_probability(reference, ids)
    chosen, rejected = log_probability(model, ids) - expected
    return -logsigmoid(beta * (chosen - rejected))


@pytest.mark.parametrize(("name", "start"), [("float32", True), ("float32", "pissa"), ("nf4", True)])
def test_dpo_with_itself_for_a_reference_is_dpo_with_two_models(name, start, folder):
    base = pretrained(folder, name).train()  # in eval() bitsandbytes may repack weights, and round their constants
    model = copy.deepcopy(base)
    lora.inject(model, target_modules="all-linear", r=4, lora_dropout=0.1, init_lora_weights=start)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    ids, results = torch.stack(IDS[1:3]), []
    for reference in (base, Reference(model)):
        torch.manual_seed(1)
        model.zero_grad()
        loss = dpo(model, reference, ids)
        loss.backward()
        results.append((loss.detach(), {own: p.grad.clone() for own, p in model.named_parameters() if p.requires_grad}))
    close = {"rtol": 1e-4, "atol": 1e-5} if start == "pissa" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(results[1], results[0], **close)
    assert abs(results[0][0].item() - torch.log(torch.tensor(2.0)).item()) > 1e-3  # it is not where DPO starts


def test_a_reference_holds_no_parameters_of_its_own(folder):
    model = adapted(folder)
    reference = Reference(model)
    assert [*reference.parameters()] == [*reference.children()] == []
    assert reference.config is model.config
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reference.train(), reference.to(torch.float64), reference.requires_grad_(False)
    assert model.model.layers[0].self_attn.q_proj.lora_A.requires_grad
