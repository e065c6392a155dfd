"""`lora.disabled` is its caller's: threads, tasks, interruptions, and what is asked of a model meanwhile."""

import asyncio
import contextvars
import copy
import pickle
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn as nn
from interruptions import is_interrupted
from releases import since
from toy_model import IDS, Model, snapshot

import lora

ADAPTERS = {"target_modules": ["q_proj", "v_proj"], "r": 2}
MORE = {**ADAPTERS, "bias": "all", "modules_to_save": ["head", "norm"]}
FIELDS = pytest.mark.parametrize("fields", [ADAPTERS, MORE], ids=["adapters", "more"])


@torch.no_grad()
def trained(fields):
    """A model after training, and the outputs with and without what it learnt."""
    model = Model()
    base = model(IDS)
    lora.inject(model, **fields)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter))
    return model, model(IDS).detach(), base


def in_thread(function, *args):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result(60)


def parameters(model):
    return [id(parameter) for parameter in model.parameters()]


def nothing_is_left(model):
    names = [*vars(model), *(name for module in model.modules() for name in vars(module))]
    kinds = ("_state_dict_hooks", "_load_state_dict_pre_hooks", "_forward_pre_hooks")
    hooks = any(getattr(module, kind) for module in model.modules() for kind in kinds)
    return not {"lora_disabled", "lora_exchanged"} & {*names} and not hooks


# ---- whose it is ------------------------------------------------------------------------------------------------


def test_another_thread_has_the_model_with_lora_meanwhile():
    model, on, off = trained(ADAPTERS)
    with lora.disabled(model):
        assert torch.equal(in_thread(model, IDS), on)
        assert torch.equal(model(IDS), off)
    assert torch.equal(model(IDS), on)
    assert nothing_is_left(model)


def test_another_task_has_the_model_with_lora_meanwhile():
    model, on, off = trained(ADAPTERS)
    turn, done = asyncio.Event(), asyncio.Event()

    async def reference():
        with lora.disabled(model):
            turn.set()
            await done.wait()
            return model(IDS)

    async def request():
        await turn.wait()
        y = model(IDS)
        done.set()
        return y

    async def both():
        return await asyncio.gather(reference(), request())

    without, with_lora = asyncio.run(both())
    assert torch.equal(without, off)
    assert torch.equal(with_lora, on)


def test_a_task_that_is_started_within_belongs_to_the_block_until_it_ends():
    model, on, off = trained(ADAPTERS)

    async def twice(ended):
        first = model(IDS)
        await ended.wait()
        return first, model(IDS)

    async def main():
        ended = asyncio.Event()
        with lora.disabled(model):
            task = asyncio.create_task(twice(ended))
            await asyncio.sleep(0)
        ended.set()
        return await task

    first, second = asyncio.run(main())
    assert torch.equal(first, off)
    assert torch.equal(second, on)


@FIELDS
def test_a_thread_that_works_in_a_copy_of_the_context_belongs_to_the_block(fields):
    model, _, off = trained(fields)
    with lora.disabled(model):
        assert torch.equal(in_thread(contextvars.copy_context().run, model, IDS), off)


@FIELDS
def test_a_block_may_be_left_in_another_context(fields):
    model, on, off = trained(fields)

    def outputs():
        with lora.disabled(model):
            while True:
                yield model(IDS)

    generator = outputs()
    assert torch.equal(next(generator), off)
    in_thread(generator.close)  # as a finaliser may do it
    assert torch.equal(model(IDS), on)
    assert nothing_is_left(model)


def test_it_decorates_functions_that_call_themselves():
    model, on, off = trained(MORE)

    @lora.disabled(model)
    def reference(depth):
        return reference(depth - 1) if depth else model(IDS)

    for _ in range(2):
        assert torch.equal(reference(2), off)
        assert torch.equal(model(IDS), on)


def test_one_block_is_entered_once():
    model, *_ = trained(ADAPTERS)
    block = lora.disabled(model)
    with block, pytest.raises(RuntimeError, match="entered already"), block:
        pass
    assert nothing_is_left(model)
    with block:  # left, it may be entered again
        pass


# ---- where tensors are exchanged --------------------------------------------------------------------------------


def test_a_forward_that_would_have_the_bases_biases_raises_and_says_what_to_do():
    model, on, _ = trained(MORE)
    said = r"another thread or task is within `lora\.disabled`.*disable a copy"
    with lora.disabled(model), pytest.raises(RuntimeError, match=said):
        in_thread(model, IDS)
    assert torch.equal(in_thread(model, IDS), on)


def test_a_forward_that_is_past_its_last_lora_layer_raises_as_well():
    model, *_ = trained(MORE)
    entered, left = threading.Event(), threading.Event()

    def wait(module, args, output):
        entered.set()
        left.wait(60)

    with model.layers[1].register_forward_hook(wait), ThreadPoolExecutor(1) as pool:
        output = pool.submit(model, IDS)
        entered.wait(60)
        with lora.disabled(model):
            left.set()
            with pytest.raises(RuntimeError, match="another thread or task is within"):
                output.result(60)


def test_blocks_of_several_threads_end_in_any_order_and_lose_nothing():
    model, on, off = trained(MORE)
    before, entered, left = parameters(model), threading.Barrier(2), threading.Barrier(2)

    def first():
        with lora.disabled(model):
            entered.wait(60)
        left.wait(60)

    def second():
        with lora.disabled(model):
            entered.wait(60)
            left.wait(60)
            return model(IDS)

    with ThreadPoolExecutor(2) as pool:
        outputs = [pool.submit(first), pool.submit(second)]
    assert torch.equal(outputs[1].result(), off)
    assert parameters(model) == before
    assert torch.equal(model(IDS), on)
    assert nothing_is_left(model)


def test_a_part_and_the_whole_overlap_with_a_tie_across_them():
    model = Model(tied=True)
    base = model(IDS)
    lora.inject(model, **ADAPTERS, modules_to_save=["embed"])
    nn.init.normal_(model.embed.weight)
    on, weight = model(IDS), model.embed.weight
    part, whole = lora.disabled(nn.ModuleList([model.embed, *model.layers])), lora.disabled(model)
    part.__enter__()
    whole.__enter__()
    assert torch.equal(model(IDS), base)
    assert model.head.weight is model.embed.weight
    part.__exit__(None, None, None)
    assert torch.equal(model(IDS), base)
    whole.__exit__(None, None, None)
    assert model.head.weight is model.embed.weight is weight
    assert torch.equal(model(IDS), on)


def test_recurrent_layers_compute_with_the_bases_biases():
    """They keep a list of their parameters beside the parameters."""
    model = nn.ModuleDict({"rnn": nn.LSTM(4, 4), "a": nn.Linear(4, 4)})
    x = torch.randn(3, 2, 4)
    base = model["rnn"](x)[0]
    lora.inject(model, target_modules=["a"], r=2, bias="all")
    with torch.no_grad():
        model["rnn"].bias_ih_l0.add_(1)
    on = model["rnn"](x)[0]
    with lora.disabled(model):
        assert torch.equal(model["rnn"](x)[0], base)
    assert torch.equal(model["rnn"](x)[0], on)


def test_state_dicts_hold_what_trained_within_a_block():
    model, *_ = trained(MORE)
    model.layers[0].norm.register_buffer("scale", torch.ones(8))
    for make in (
        nn.Module.state_dict,
        lambda m: m.state_dict(keep_vars=True),
        lambda m: m.head.state_dict(prefix="head."),
        lambda m: lora.lora_state_dict(m, bias="all"),
    ):
        wanted = make(model)
        with lora.disabled(model):
            got = make(model)
        assert list(got) == list(wanted)
        for name, tensor in wanted.items():
            assert torch.equal(got[name], tensor), name
            assert got[name].requires_grad == tensor.requires_grad
            assert got[name].data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_is_loaded_into_what_trained_within_a_block(assign):
    model, _, off = trained(MORE)
    before = parameters(model)
    state = {name: torch.full_like(tensor, 0.125) for name, tensor in model.state_dict().items()}
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    base = copy.deepcopy(model)
    lora.eject(base)
    with lora.disabled(model):
        frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        model.load_state_dict(state, assign=assign)
        assert torch.equal(model.layers[0].norm.weight, base.layers[0].norm.weight)  # the base's is what it was
        assert not torch.equal(model(IDS), off)  # but for what is frozen, which the state dict holds too
        assert assign or all(frozen[name] is p for name, p in model.named_parameters() if not p.requires_grad)
    assert all((tensor == 0.125).all() for tensor in model.state_dict().values())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trains
    assert assign or parameters(model) == before


def test_a_state_dict_of_other_shapes_is_refused_by_torch_within_a_block():
    model, on, _ = trained(MORE)
    with lora.disabled(model), pytest.raises(RuntimeError, match=r"size mismatch for head\.weight"):
        model.load_state_dict({**model.state_dict(), "head.weight": torch.ones(2, 2)})
    assert torch.equal(model(IDS), on)


def test_what_trained_follows_where_the_model_is_cast_within_a_block():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    lora.inject(model, target_modules=["0"], r=2, modules_to_save=["1"], bias="all")
    x = torch.randn(8, 4)
    twin, before = copy.deepcopy(model), parameters(model)
    for each in (model, twin):
        each(x).square().sum().backward()
    with lora.disabled(model):
        assert model.double()(x.double()).dtype == torch.float64
    assert parameters(model) == before
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float64, torch.int64}
    twin.double()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        assert (ours.grad is None) == (theirs.grad is None), name
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad), name
    assert torch.equal(model.eval()(x.double()), twin.eval()(x.double()))


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_is_refused_while_tensors_are_exchanged(copied):
    model, on, _ = trained(MORE)
    with lora.disabled(model), pytest.raises(RuntimeError, match="copy or pickle it outside of the block"):
        copied(model)
    assert torch.equal(copied(model)(IDS), on)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_is_disabled_until_the_block_ends(copied):
    model, on, off = trained(ADAPTERS)
    with lora.disabled(model):
        other = copied(model)
        assert torch.equal(other(IDS), off)
        assert torch.equal(in_thread(other, IDS), on)
    assert torch.equal(other(IDS), on)
    assert nothing_is_left(other)
    lora.merge(other)


def test_a_copy_of_what_another_thread_disabled_is_not_disabled():
    mine, (theirs, on, _) = trained(ADAPTERS)[0], trained(ADAPTERS)
    with lora.disabled(mine):
        entered, left = threading.Event(), threading.Event()

        def disable():
            with lora.disabled(theirs):
                entered.set()
                assert left.wait(60)

        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(disable)
            assert entered.wait(60)
            other = copy.deepcopy(theirs)
            left.set()
            future.result(60)
        assert torch.equal(other(IDS), on)
    assert nothing_is_left(other)


def test_what_was_pickled_in_a_block_is_not_disabled_elsewhere():
    model, on, _ = trained(ADAPTERS)
    with lora.disabled(model):
        pickled = pickle.dumps(model)
        assert torch.equal(in_thread(pickle.loads, pickled)(IDS), on)


# ---- what may be done meanwhile ---------------------------------------------------------------------------------


def test_what_reads_the_model_works_where_nothing_is_exchanged(tmp_path):
    model, on, _ = trained(ADAPTERS)
    merged = lora.merged_state_dict(model)
    with lora.disabled(model):
        lora.save_adapter(model, tmp_path / "a.safetensors")
        assert len(lora.param_groups(model, lr=1.0)) == 2
        assert all(torch.equal(tensor, merged[name]) for name, tensor in lora.merged_state_dict(model).items())
    other = Model()
    other.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if "lora_" not in name})
    lora.load_adapter(other, tmp_path / "a.safetensors")
    assert torch.equal(other(IDS), on)


def test_an_adapter_is_loaded_while_another_thread_has_a_block():
    model, _, off = trained(ADAPTERS)
    other = copy.deepcopy(model)
    nn.init.ones_(other.layers[0].attn["q_proj"].lora_B)
    with lora.disabled(model):
        in_thread(lora.load_adapter, model, lora.adapter_of(other))
        assert torch.equal(model(IDS), off)
    assert torch.equal(model(IDS), other(IDS))


def test_a_load_that_fails_takes_nothing_from_a_block_that_began_meanwhile(monkeypatch):
    model, on, off = trained(ADAPTERS)
    block = lora.disabled(model)

    def fails(*args):
        block.__enter__()
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["lora.adapters.checkpoint"], "_write", fails)
    with pytest.raises(KeyboardInterrupt):
        lora.load_adapter(model, lora.adapter_of(model))
    assert torch.equal(model(IDS), off)
    block.__exit__(None, None, None)
    assert torch.equal(model(IDS), on)
    assert nothing_is_left(model)


def test_an_adapter_with_more_in_it_is_not_loaded_meanwhile():
    model, on, _ = trained(ADAPTERS)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.head.weight.requires_grad_(True).add_(1)
    lora.mark_only_lora_as_trainable(other, bias="all")
    with torch.no_grad():
        other.layers[0].norm.bias.add_(1)
    with lora.disabled(model):
        before = snapshot(model)
        with pytest.raises(ValueError, match="load_adapter: LoRA is disabled"):
            lora.load_adapter(model, lora.adapter_of(other), check_base=False)
        assert snapshot(model) == before
    assert torch.equal(model(IDS), on)


@pytest.mark.parametrize("function", [lora.mark_only_lora_as_trainable, lambda m: lora.param_groups(m, lr=1.0)])
def test_what_trains_is_not_told_by_the_bases_tensors(function):
    model, *_ = trained(MORE)
    with lora.disabled(model):
        before = snapshot(model)
        with pytest.raises(ValueError, match="the base's values stand where others trained"):
            function(model)
        assert snapshot(model) == before


@pytest.mark.parametrize("function", [lora.merge, lora.eject], ids=["merge", "eject"])
def test_layers_are_not_taken_from_under_another_threads_block(function):
    model, *_ = trained(ADAPTERS)
    with lora.disabled(model):
        before = snapshot(model)
        with pytest.raises(ValueError, match="LoRA is disabled"):
            in_thread(function, model)
        assert snapshot(model) == before


# ---- threads without a context of their own ---------------------------------------------------------------------


class Recomputes(torch.autograd.Function):
    """Calls a function in backward, as activation checkpointing does."""

    @staticmethod
    def forward(ctx, x, function):
        ctx.function = function
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        ctx.function()
        return dy, None


TELLS = pytest.param(True, marks=since("2.12", "autograd tells its threads nothing of the caller"))


@pytest.mark.parametrize("tells", [TELLS, False], ids=["told", "not told"])
def test_autograds_own_threads_compute_as_the_caller_of_backward(tells):
    """Those of accelerators, which are not here: a thread that has what they have, on a device that is not the CPU."""
    layer = lora.Linear(4, 4, r=2, device="meta")
    found = []

    def recompute(context):
        if tells:
            torch._C._stash_obj_in_tls("context", context)
        elif torch._C._is_key_in_tls("context"):
            torch._C._remove_obj_from_tls("context")
        found.append(layer.lora_is_off())

    def backward(context):
        x = torch.ones(1, requires_grad=True)
        Recomputes.apply(x, lambda: recompute(context)).backward()

    outside = contextvars.copy_context()
    with lora.disabled(layer):
        in_thread(backward, contextvars.copy_context())
        in_thread(backward, outside)
    in_thread(backward, outside)
    assert found == [True, not tells, False]


def test_on_a_cpu_backward_of_another_thread_computes_with_lora():
    model, on, _ = trained(ADAPTERS)
    found = []

    def backward():
        Recomputes.apply(torch.ones(1, requires_grad=True), lambda: found.append(model(IDS))).backward()

    with lora.disabled(model):
        in_thread(backward)
    assert torch.equal(found[0], on)


@FIELDS
def test_replicas_of_data_parallel_compute_as_their_caller(fields):
    model, on, off = trained(fields)

    def replica(model):
        """What `torch.nn.parallel.replicate` makes for a device."""
        made = model._replicate_for_data_parallel()
        for name, parameter in model._parameters.items():
            setattr(made, name, parameter)
        for name, child in model._modules.items():
            made._modules[name] = replica(child)
        return made

    with lora.disabled(model):
        disabled = replica(model)
        assert torch.equal(in_thread(disabled, IDS), off)
        if fields is ADAPTERS:
            assert torch.equal(in_thread(in_thread(replica, model), IDS), on)
    assert torch.equal(in_thread(replica(model), IDS), on)


# ---- interruptions ----------------------------------------------------------------------------------------------


def small(fields):
    """A smaller model with all that is exchanged, and with a prepared layer."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    x = torch.randn(4, 3)
    base = model.eval()(x)
    lora.inject(model, target_modules=["0"], r=1, **fields)
    lora.prepare_for_swap(model, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
        if fields:
            model[1].running_mean.add_(1)
    return model, x, model(x).detach(), base


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Python's, of those in a finaliser
@pytest.mark.parametrize("fields", [{}, {"bias": "all", "modules_to_save": ["1"]}], ids=["adapters", "more"])
def test_it_is_entered_and_left_whole_wherever_it_is_interrupted(fields):
    model, x, on, off = small(fields)
    before = snapshot(model)
    scales = [tensor.tolist() for tensor in model[0].buffers()]
    n, reached = 0, True
    while reached:
        n += 1

        def use():
            with lora.disabled(model):
                pass

        reached = is_interrupted(use, n)
        after = snapshot(model)
        assert after == before, n
        assert nothing_is_left(model), n
        assert [tensor.tolist() for tensor in model[0].buffers()] == scales, n
        assert not sys.modules["lora.models.disabling"]._turn, n
    assert n > 400
    assert torch.equal(model(x), on)
    with lora.disabled(model):
        assert torch.equal(model(x), off)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interruption_within_another_block_leaves_that_open():
    model, x, on, off = small({"bias": "all", "modules_to_save": ["1"]})
    n, reached = 0, True
    while reached:
        n += 7  # some of the lines

        def use():
            with lora.disabled(model):
                pass

        with lora.disabled(model):
            reached = is_interrupted(use, n)
            assert torch.equal(model(x), off), n
        assert torch.equal(model(x), on), n


# ---- many at once -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@FIELDS
def test_threads_that_disable_and_threads_that_do_not_get_what_they_asked_for(fields):
    model, on, off = trained(fields)
    before, end, wrong, refused = parameters(model), time.monotonic() + 4, [], []

    def reference():
        while time.monotonic() < end:
            with torch.no_grad(), lora.disabled(model):
                if not torch.equal(model(IDS), off):
                    wrong.append("off")

    def request():
        while time.monotonic() < end:
            try:
                with torch.no_grad():
                    y = model(IDS)
            except RuntimeError as error:
                refused.append(str(error))
            else:
                # Of a module that was just reading its tensors when they were exchanged, nobody can tell.
                if fields is ADAPTERS and not torch.equal(y, on):
                    wrong.append("on")

    with ThreadPoolExecutor(6) as pool:
        for future in [pool.submit(function) for function in (reference, request) * 3]:
            future.result()
    assert not wrong
    assert all("within `lora.disabled`" in error for error in refused)
    assert fields is MORE or not refused
    assert parameters(model) == before
    assert torch.equal(model(IDS), on)
    assert nothing_is_left(model)
