"""`task_type`: heads that `from_pretrained` makes at random train, are saved and loaded, as with PEFT."""

import copy
import logging
import re

import peft
import pytest
import torch
import transformers
from peft_models import QUIET
from torch import nn
from toy_model import snapshot

import lora

pytestmark = QUIET

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {"vocab_size": 40, "max_position_embeddings": 32, "pad_token_id": 0}
IDS = torch.tensor([[5, 7, 9, 11, 13], [6, 8, 3, 4, 39]])
BERT = transformers.BertConfig(**SIZES, **TEXT)
LLAMA = transformers.LlamaConfig(**SIZES, **TEXT, num_key_value_heads=1, bos_token_id=1, eos_token_id=2)
DISTILBERT = transformers.DistilBertConfig(
    vocab_size=40, max_position_embeddings=32, dim=16, hidden_dim=24, n_layers=2, n_heads=2
)

# The pretrained body, the model with a new head, its targets, and the heads that are to train.
MODELS = {
    "bert SEQ_CLS": (BERT, "BertForSequenceClassification", ["query", "value"], {"classifier"}),
    "bert TOKEN_CLS": (BERT, "BertForTokenClassification", ["query", "value"], {"classifier"}),
    "bert QUESTION_ANS": (BERT, "BertForQuestionAnswering", ["query", "value"], {"qa_outputs"}),
    "llama SEQ_CLS": (LLAMA, "LlamaForSequenceClassification", ["q_proj", "v_proj"], {"score"}),
    "llama TOKEN_CLS": (LLAMA, "LlamaForTokenClassification", ["q_proj", "v_proj"], {"score"}),
    "llama QUESTION_ANS": (LLAMA, "LlamaForQuestionAnswering", ["q_proj", "v_proj"], {"qa_outputs"}),
    "distilbert SEQ_CLS": (
        DISTILBERT, "DistilBertForSequenceClassification", ["q_lin"], {"classifier", "pre_classifier"}
    ),
    "distilbert TOKEN_CLS": (DISTILBERT, "DistilBertForTokenClassification", ["q_lin"], {"classifier"}),
    "distilbert QUESTION_ANS": (DISTILBERT, "DistilBertForQuestionAnswering", ["q_lin"], {"qa_outputs"}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.ERROR, logger="transformers")


@pytest.fixture(params=MODELS)
def made(request, tmp_path):
    """A function that loads the pretrained body under a head that is new each time; and what is to happen to it."""
    config, name, targets, heads = MODELS[request.param]
    torch.manual_seed(1)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path / "body")

    def make(seed):
        torch.manual_seed(seed)
        return getattr(transformers, name).from_pretrained(tmp_path / "body", num_labels=2).eval()

    return make, {"target_modules": targets, "task_type": request.param.split()[1], "r": 2}, heads


@torch.no_grad()
def trained(model):
    """Other random values for all that trains, large enough that each shows."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape) * (0.3 if "lora_" in name else 1.0))
    return model


@torch.no_grad()
def output(model):
    result = model(input_ids=IDS)
    return result.logits if hasattr(result, "logits") else torch.stack([result.start_logits, result.end_logits])


def different(make):
    """What a new head says is not what another one says: a head that is lost would show."""
    assert (output(make(2)) - output(make(3))).abs().max() > 1e-3


def test_a_new_head_trains_and_goes_through_a_file(made, tmp_path):
    make, fields, heads = made
    different(make)
    model = make(2)
    report = lora.inject(model, **fields)
    assert set(report.saved_in_full) == heads
    in_full = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert in_full == {name for name, _ in model.named_parameters() if name.rpartition(".")[0] in heads}
    lora.save_adapter(trained(model), tmp_path / "a")
    other = make(3)
    lora.load_adapter(other, tmp_path / "a")
    assert torch.equal(output(other), output(model))
    twin = make(3)  # into a model that is adapted already
    lora.inject(twin, **fields)
    lora.load_adapter(twin, tmp_path / "a")
    assert torch.equal(output(twin), output(model))


def test_peft_loads_the_head_that_we_wrote(made, tmp_path):
    make, fields, _ = made
    model = make(2)
    lora.inject(model, **fields)
    lora.save_adapter(trained(model), tmp_path / "a", format="peft")
    theirs = peft.PeftModel.from_pretrained(make(3), tmp_path / "a").eval()
    torch.testing.assert_close(output(theirs), output(model), rtol=1e-5, atol=1e-5)


def test_we_train_what_peft_does_and_load_the_head_that_it_wrote(made, tmp_path):
    make, fields, _ = made
    theirs = peft.get_peft_model(make(2), peft.LoraConfig(**fields)).eval()
    ours = make(2)
    lora.inject(ours, **fields)
    assert sizes(ours) == sizes(theirs)
    trained(theirs).save_pretrained(tmp_path / "a")
    other = make(3)
    lora.load_adapter(other, tmp_path / "a")
    torch.testing.assert_close(output(other), output(theirs), rtol=1e-5, atol=1e-5)
    # and on to PEFT again: what it trained in whole modules is known as that
    lora.save_adapter(other, tmp_path / "b", format="peft")
    again = peft.PeftModel.from_pretrained(make(4), tmp_path / "b").eval()
    torch.testing.assert_close(output(again), output(theirs), rtol=1e-5, atol=1e-5)


def sizes(model):
    return sorted(tuple(p.shape) for p in model.parameters() if p.requires_grad)


def test_all_linear_leaves_the_head_to_train_in_full(made, tmp_path):
    make, fields, heads = made
    model = make(2)
    report = lora.inject(model, **fields | {"target_modules": "all-linear"})
    assert set(report.saved_in_full) == heads
    adapted = {name for name, module in model.named_modules() if isinstance(module, lora.LoRALayer)}
    assert adapted == {n for n, m in make(2).named_modules() if isinstance(m, nn.Linear)} - heads


def test_disabled_and_eject_give_the_head_that_was_there(made):
    make, fields, _ = made
    model = make(2)
    lora.inject(model, **fields)
    trained(model)
    with lora.disabled(model):
        assert torch.equal(output(model), output(make(2)))
    lora.eject(model)
    assert torch.equal(output(model), output(make(2)))


def test_training_a_classifier_keeps_its_accuracy_through_a_file(tmp_path):
    torch.manual_seed(0)
    transformers.BertModel(BERT).save_pretrained(tmp_path / "body")
    ids = torch.randint(5, 40, (24, 6))
    ids[:, 1] = torch.arange(24) % 6 + 10
    labels = torch.arange(24) % 6

    def make(seed):
        torch.manual_seed(seed)
        model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "body", num_labels=6)
        return model.eval()

    def accuracy(model):
        with torch.no_grad():
            return (model(ids).logits.argmax(-1) == labels).float().mean().item()

    model = make(2)
    lora.inject(model, target_modules=["query", "value"], r=4, task_type="SEQ_CLS")
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(60):
        model(ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert accuracy(model) == 1
    lora.save_adapter(model, tmp_path / "a")
    other = make(3)
    assert accuracy(other) < 0.5
    lora.load_adapter(other, tmp_path / "a")
    assert accuracy(other) == 1


# ---- what cannot be --------------------------------------------------------------------------------------------


def bart():
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.BartConfig(
        vocab_size=40, d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32, **sizes
    )
    return transformers.BartForSequenceClassification(config)


def test_a_model_without_such_a_head_is_refused_with_what_was_looked_for():
    model = bart()
    before = snapshot(model)
    message = (
        "`task_type` 'SEQ_CLS' trains the head, and no module with parameters of this BartForSequenceClassification "
        "has a name that ends in 'classifier' or 'score'; name the head in `modules_to_save` (beside the body it has "
        "'classification_head')."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        lora.inject(model, target_modules=["q_proj"], task_type="SEQ_CLS")
    assert snapshot(model) == before
    report = lora.inject(model, target_modules=["q_proj"], task_type="SEQ_CLS", modules_to_save=["classification_head"])
    assert report.saved_in_full == ("classification_head",)


def test_a_head_without_parameters_is_none():
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "classifier": nn.Identity()})
    with pytest.raises(ValueError, match=r"ends in 'classifier' or 'score'.*beside the body it has 'body'"):
        lora.inject(model, target_modules=["body"], task_type="TOKEN_CLS")


def test_modules_to_save_come_in_addition_and_the_users_list_stays():
    model = transformers.BertForSequenceClassification(BERT)
    wanted = ["pooler"]
    report = lora.inject(model, target_modules=["query"], task_type="SEQ_CLS", modules_to_save=wanted)
    assert report.saved_in_full == ("bert.pooler", "classifier")
    assert wanted == ["pooler"]


def test_a_target_within_the_head_is_refused_by_name():
    model = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**SIZES, **TEXT))
    message = (
        r"classifier: the head of `task_type` 'SEQ_CLS' trains in full and cannot be adapted, or hold a module that "
        r"is: classifier\.dense\."
    )
    with pytest.raises(ValueError, match=message):
        lora.inject(model, target_modules=["dense"], task_type="SEQ_CLS")
    lora.inject(model, target_modules=["dense"], task_type="SEQ_CLS", exclude_modules=["classifier.dense"])
    assert model.classifier.dense.weight.requires_grad


@pytest.mark.parametrize("task", peft.TaskType)
def test_pefts_task_types_are_taken_as_words_and_as_its_enum(task):
    ours = lora.LoraConfig(target_modules=["0"], task_type=task)
    assert type(ours.task_type) is str
    assert ours == lora.LoraConfig(target_modules=["0"], task_type=task.value)
    copy.deepcopy(ours)


def test_tasks_without_new_heads_train_nothing_more():
    for task in ("CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION", None):
        model = nn.ModuleDict({"body": nn.Linear(4, 4), "classifier": nn.Linear(4, 2)})
        assert lora.inject(model, target_modules=["body"], task_type=task).saved_in_full == ()


@pytest.mark.parametrize("task", ["seq_cls", "", 3, ["SEQ_CLS"]])
def test_an_unknown_task_is_refused_with_all_that_there_are(task):
    words = "'SEQ_CLS', 'TOKEN_CLS', 'QUESTION_ANS', 'CAUSAL_LM', 'SEQ_2_SEQ_LM', 'FEATURE_EXTRACTION'"
    with pytest.raises(ValueError, match=f"`task_type` must be one of {words}, got "):
        lora.LoraConfig(target_modules=["0"], task_type=task)
