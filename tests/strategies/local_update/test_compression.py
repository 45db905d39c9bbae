"""Fits whose averages are compressed: against arithmetic by hand, equal at the end, resumed."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from support.processes import launch
from support.shared_ranks import SharedRanks
from support.training import Regression, descend, loader, local_update, network, own_file, trainer, weights

from lightning_comm import Averaging, Cast, FixedPeriod, Int8, LocalUpdateStrategy, SparseMask, TopK

STEPS, PERIOD = 14, 4
NUMEL = sum(parameter.numel() for parameter in network().parameters())


class Trace(Callback):
    """This rank's weights after every step, and whether ranks may differ."""

    def __init__(self):
        self.weights, self.apart = [], []

    def on_train_batch_end(self, runner, pl_module, *_):
        self.weights.append(weights(pl_module))
        self.apart.append(runner.strategy._run.rounds.apart)


def _fit(rank, compression, world_size, kw):
    trace = Trace()
    callbacks = [trace, *kw.pop("callbacks", [])]
    ckpt_path = kw.pop("ckpt_path", None)
    strategy = local_update(FixedPeriod(PERIOD), averaging=Averaging(compression=compression))
    module = Regression()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(strategy, world_size, callbacks=callbacks, **kw).fit(
            module, loader(STEPS, rank), loader(2, rank), ckpt_path=ckpt_path
        )
    said = [str(warning.message) for warning in caught]
    return trace, weights(module), strategy, said


def _trace(rank, compression, world_size, kw):
    trace, final, strategy, _ = _fit(rank, compression, world_size, kw)
    ends = [done.step for done in strategy.history]
    return trace.weights, trace.apart, final, ends, strategy.ledger.payload_bytes("parameters")


def by_hand(rank_weights, reference):
    """A bf16 synchronisation of two ranks, in place."""
    for k, x in enumerate(reference):
        differences = [each[k] - x for each in rank_weights]
        wires = [(0.5 * d).bfloat16() for d in differences]
        x += (wires[0] + wires[1]).double()
        for each, d, wire in zip(rank_weights, differences, wires, strict=True):
            each[k].copy_(x + (d - 2 * wire.double()))


def in_one_process():
    """Weights of both ranks after every step."""
    models = [network() for _ in range(2)]
    parameters = [[p.data for p in model.parameters()] for model in models]
    reference = [p.clone() for p in parameters[0]]
    for step in range(STEPS):
        for rank, model in enumerate(models):
            descend(model, rank, step)
        if step + 1 == STEPS:
            for one, two in zip(*parameters, strict=True):
                one.copy_(two.copy_((one + two) / 2))
        elif (step + 1) % PERIOD == 0:
            by_hand(parameters, reference)
        yield [[p.clone().numpy() for p in each] for each in parameters]


def test_two_ranks_do_what_one_process_does_for_both():
    expected = list(in_one_process())
    answers = RUNS["bf16"]
    for rank, (states, apart, _, ends, payload_bytes) in enumerate(answers):
        assert ends == [4, 8, 12, 14]
        assert apart == [True] * (STEPS - 1) + [False]
        assert payload_bytes == 3 * 2 * NUMEL + 8 * NUMEL  # the last one in full
        for step, state in enumerate(states):
            for got, wanted in zip(state, expected[step][rank], strict=True):
                np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-12, err_msg=f"rank {rank} at step {step}")


LENGTHS = {"an epoch": {}, "6 steps": {"max_epochs": -1, "max_steps": 6}, "2 epochs": {"max_epochs": 2}}
COMPRESSIONS = {"int8": "int8", "topk": TopK(0.1), "powersgd": "powersgd"}


# each compression, each length
ENDS = [("int8", "2 epochs"), ("topk", "an epoch"), ("powersgd", "6 steps")]
MORE_ENDS = [(name, length) for name in COMPRESSIONS for length in LENGTHS if (name, length) not in ENDS]


@pytest.mark.parametrize(
    ("compression", "length"), [*ENDS, *(pytest.param(*each, marks=pytest.mark.exhaustive) for each in MORE_ENDS)]
)
def test_a_run_ends_with_equal_weights_and_ranks_differ_before(compression, length):
    one, two = (RUNS if (compression, length) in ENDS else MORE_RUNS)[compression, length]
    for mine, theirs in zip(one[2], two[2], strict=True):
        np.testing.assert_array_equal(mine, theirs)
    after_round = PERIOD - 1
    assert any((a != b).any() for a, b in zip(one[0][after_round], two[0][after_round], strict=True))


class Stop(Callback):
    """Rank 1 wants to stop at a step at which a round ends."""

    def on_train_batch_end(self, runner, *_):
        if runner.global_rank == 1 and runner.global_step == PERIOD:
            runner.should_stop = True


def _stop(rank):
    trace, final, *_ = _fit(rank, "int8", 2, {"callbacks": [Stop()], "max_epochs": 3})
    return len(trace.weights), final


def test_a_stop_leaves_equal_weights():
    (steps, one), (same, two) = RUNS["stopped"]
    assert steps == same < 3 * STEPS
    for mine, theirs in zip(one, two, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def _validate(rank):
    class Inside(Callback):
        def on_validation_batch_start(self, runner, pl_module, *_):
            if not runner.sanity_checking:
                seen.append(weights(pl_module))

    seen = []
    kw = {"limit_val_batches": 1, "val_check_interval": 4}
    trace, *_ = _fit(rank, "int8", 2, {"callbacks": [Inside()], **kw})
    return trace.weights, seen


def test_validation_sees_the_average_and_leaves_no_trace():
    # at step 4 right after a compressed synchronisation, where ranks differ too
    plain, validated = RUNS["int8", "2 epochs"], RUNS["validated"]
    for rank in range(2):
        until_the_end = slice(STEPS - 1)  # with which one of them averages in full
        for a, b in zip(plain[rank][0][until_the_end], validated[rank][0][until_the_end], strict=True):
            assert all((x == y).all() for x, y in zip(a, b, strict=True))
    seen = [answer[1] for answer in validated]
    assert len(seen[0]) == 3
    for k, step in enumerate((4, 8, 12)):
        own = [validated[rank][0][step - 1] for rank in range(2)]
        for one, two, a, b in zip(seen[0][k], seen[1][k], *own, strict=True):
            np.testing.assert_array_equal(one, two)
            np.testing.assert_allclose(one, (a + b) / 2, rtol=0, atol=1e-15)


def _resume_without_rank_files(rank, folder):
    save = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=8, save_top_k=-1)
    _fit(rank, "int8", 2, {"callbacks": [save], "enable_checkpointing": True})
    torch.distributed.barrier()
    path = Path(folder) / "step=8.ckpt"
    if rank == 0:
        saved = torch.load(own_file(path, 0), weights_only=True)
        assert saved["apart"]
        assert saved["compression"]["compression"] == {"class": "Int8", "fields": {}}
        own_file(path, 1).unlink()
    torch.distributed.barrier()
    _, final, strategy, said = _fit(rank, "int8", 2, {"ckpt_path": path})
    return [done.step for done in strategy.history], final, any("new round" in text for text in said)


def test_without_rank_files_the_reference_starts_anew_from_the_averaged_weights(tmp_path):
    (ends, one, warned), (_, two, _) = launch(_resume_without_rank_files, str(tmp_path), world_size=2)
    assert warned
    assert ends == [12, 14]
    for mine, theirs in zip(one, two, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def _change_compression(rank, folder, first, second):
    save = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=6, save_top_k=-1)
    _fit(rank, first, 2, {"callbacks": [save], "enable_checkpointing": True})
    torch.distributed.barrier()
    _, final, strategy, _ = _fit(rank, second, 2, {"ckpt_path": Path(folder) / "step=6.ckpt"})
    return final, [done.step for done in strategy.history]


@pytest.mark.parametrize(("first", "second"), [(None, "int8"), ("bf16", "int8"), ("int8", None)])
def test_a_run_may_be_resumed_under_another_compression(first, second, tmp_path):
    (one, ends), (two, _) = launch(_change_compression, str(tmp_path), first, second, world_size=2)
    assert ends == [8, 12, 14]
    for mine, theirs in zip(one, two, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def _moving_average(rank):
    ema = EMAWeightAveraging(decay=0.8)
    trace, final, *_ = _fit(rank, "int8", 2, {"callbacks": [ema]})
    return trace.apart[-1], final, weights(ema._average_model.module)


def test_moving_averages_of_weights_end_equal_too():
    answers = RUNS["moving average"]
    for apart, final, shadow in answers:
        assert not apart
        for mine, theirs, averaged in zip(final, answers[0][1], shadow, strict=True):
            np.testing.assert_array_equal(mine, theirs)
            np.testing.assert_array_equal(mine, averaged)  # copied over the weights at the end


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("bf16", Cast("bf16")),
        ("int8", Int8()),
        ("null", None),
        ('{"class_path": "lightning_comm.TopK", "init_args": {"ratio": 0.1}}', TopK(0.1)),
        ('["sparse_mask", "bf16"]', SparseMask(then=Cast("bf16"))),
    ],
)
def test_a_config_gives_a_word_or_an_object(given, expected):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LocalUpdateStrategy, "strategy")
    period = '{"class_path": "lightning_comm.FixedPeriod", "init_args": {"steps": 8}}'
    text = f'{{"strategy": {{"class_path": "lightning_comm.LocalUpdateStrategy", "init_args": {{"period": {period}, '
    quoted = given if given[0] in "{[" or given == "null" else f'"{given}"'
    config = parser.parse_string(text + f'"averaging": {{"compression": {quoted}}}}}}}}}')
    strategy = parser.instantiate(config).strategy
    assert strategy.settings.averaging.compression == expected


def _traced(cases):
    return {(name, length): (_trace, COMPRESSIONS[name], 2, dict(LENGTHS[length])) for name, length in cases}


RUNS = SharedRanks(
    {
        "bf16": (_trace, "bf16", 2, {}),
        **_traced(ENDS),
        "stopped": (_stop,),
        "validated": (_validate,),
        "moving average": (_moving_average,),
    },
    world_size=2,
)
MORE_RUNS = SharedRanks(_traced(MORE_ENDS), world_size=2)
