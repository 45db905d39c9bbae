"""A paced module: its times against a clock, its results against the module that is not paced."""

import time
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from lightning_comm.lab.device.pacer import DevicePacer, emulated_speed

WIDTH, LAYERS = 16, 4
SLACK = 1.5  # the machine may be busy


def stack(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))


def step(module, samples=8):
    module(torch.ones(samples, WIDTH)).square().sum().backward()


@contextmanager
def paced(module, **kwargs):
    pacer = DevicePacer(module, **{"step_s": 0.08, "batch_size": 8, "speed": 1.0, **kwargs})
    pacer.attach()
    yield pacer
    pacer.detach()


def seconds(pacer, work, samples=8):
    pacer.begin_step(samples)
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@pytest.mark.parametrize(("samples", "speed", "expected_s"), [(8, 1.0, 0.08), (4, 1.0, 0.04), (8, 0.5, 0.16)])
def test_a_step_takes_time_by_samples_and_speed_from_the_first_on(samples, speed, expected_s):
    module = stack()
    with paced(module, speed=speed) as pacer:
        took_s = [seconds(pacer, lambda: step(module, samples), samples) for _ in range(4)]
        pacer.end_step()
        assert min(took_s) >= expected_s  # the first, in which the layers are found, included
        assert sorted(took_s)[1] < SLACK * expected_s  # the machine may be busy in one or two
        assert pacer.steps == 3
        assert pacer.overruns < 3
        assert 0 < pacer.real_share < 0.5


def test_forward_takes_its_share_and_the_rest_is_backward():
    module = stack()
    with paced(module, step_s=0.1, forward_share=0.25) as pacer:
        seconds(pacer, lambda: step(module))
        forward_s = [seconds(pacer, lambda: module(torch.ones(8, WIDTH))) for _ in range(3)]
    assert 0.025 <= min(forward_s) < 0.025 * 2


def test_gradients_of_late_layers_are_ready_early_and_none_before_its_deadline():
    module, ready = stack(), {}
    began = [0.0]
    for place, layer in enumerate(module):
        layer.weight.register_post_accumulate_grad_hook(
            lambda weight, place=place: ready.update({place: time.perf_counter() - began[0]})
        )
    with paced(module, step_s=0.3, forward_share=1 / 3) as pacer:
        step(module)  # before any step: not paced
        seconds(pacer, lambda: step(module))
        pacer.begin_step(8)
        loss = module(torch.ones(8, WIDTH)).square().sum()
        began[0] = time.perf_counter()
        loss.backward()
    assert list(ready) == [3, 2, 1, 0]
    for place, ready_s in ready.items():
        assert ready_s >= 0.2 * (LAYERS - place) / LAYERS, f"layer {place}"
    assert ready[3] < ready[0]
    assert ready[3] < 0.2  # due after 50 ms, before the others


def awkward():
    """Frozen, tied, unused and repeated layers, a normalisation with state, and a checkpointed part."""
    module = stack()
    module[0].requires_grad_(False)
    module[3].weight = module[1].weight
    module.norm, module.unused = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(x):
        hidden = module[1](module[0](x)).relu_()
        hidden = checkpoint(lambda y: module[2](module.norm(y)).tanh(), hidden, use_reentrant=False)
        return module[3](module[2](hidden))

    module.forward = forward
    return module


def test_weights_and_buffers_are_bit_for_bit_those_of_the_module_alone():
    results = []
    for with_pacer in (False, True):
        module = awkward()
        optimizer = torch.optim.SGD(module.parameters(), 0.01, momentum=0.9)
        with paced(module, step_s=0.02) as pacer:
            for seed in range(4):
                if with_pacer:
                    pacer.begin_step(8)
                torch.manual_seed(seed)
                optimizer.zero_grad()
                module(torch.randn(8, WIDTH)).square().mean().backward()
                optimizer.step()
            assert pacer.steps == (2 if with_pacer else 0)
        results.append({name: tensor.clone() for name, tensor in module.state_dict().items()})
    alone, with_pacer = results
    assert all(torch.equal(alone[name], with_pacer[name]) for name in alone)


def test_an_awkward_model_takes_the_time_of_any_other():
    module = awkward()
    with paced(module) as pacer:
        took_s = [seconds(pacer, lambda: module(torch.randn(8, WIDTH)).square().mean().backward()) for _ in range(4)]
        assert 0.08 <= min(took_s) <= sorted(took_s)[1] < SLACK * 0.08


def test_two_passes_in_a_step_share_its_time():
    module = stack()

    def work():
        step(module)
        step(module)

    with paced(module) as pacer:
        seconds(pacer, work)
        took_s = [seconds(pacer, work) for _ in range(3)]
        pacer.end_step()
        assert 0.08 <= min(took_s) < SLACK * 0.08
        assert pacer.steps == 3


def test_what_runs_outside_of_a_step_is_not_paced():
    module = stack()
    with paced(module, step_s=0.4) as pacer:
        pacer.begin_step(8)
        step(module)
        pacer.end_step()
        started = time.perf_counter()
        for _ in range(5):
            module(torch.ones(8, WIDTH))
        assert time.perf_counter() - started < 0.4 / 3  # one paced forward


def test_time_between_forward_and_backward_is_not_swallowed():
    module = stack()

    def work():
        loss = module(torch.ones(8, WIDTH)).square().sum()
        time.sleep(0.1)
        loss.backward()

    with paced(module) as pacer:
        seconds(pacer, lambda: step(module))
        assert seconds(pacer, work) >= 0.08 + 0.1


class Slow(nn.Linear):
    real_s = 0.03

    def forward(self, x):
        time.sleep(self.real_s)
        return super().forward(x)


def test_a_late_layer_takes_nothing_from_later_ones_while_there_is_slack():
    module = nn.Sequential(Slow(WIDTH, WIDTH), *stack())
    module[0].real_s = 0.08
    with paced(module, step_s=0.2, forward_share=0.5) as pacer:  # the first of five layers is due after 20 ms
        took_s = [seconds(pacer, lambda: step(module)) for _ in range(4)]
        pacer.end_step()
        assert 0.2 <= min(took_s) < 0.25  # 0.26 if the others still had 20 ms each
        assert pacer.overruns < 3


def test_sleeps_that_end_late_are_in_the_excess(monkeypatch):
    sleep = time.sleep
    monkeypatch.setattr("lightning_comm.lab.device.deadline_clock.time.sleep", lambda seconds: sleep(seconds + 0.01))
    with paced(stack(), step_s=0.2) as pacer:
        for _ in range(3):
            pacer.begin_step(8)
            step(pacer.module)
    assert 0.01 < pacer.excess < 0.5
    assert f"took {100 * pacer.excess:.1f} % longer" in pacer.summary()


def test_compute_that_is_too_slow_is_counted_with_how_much():
    module = nn.Sequential(*stack(), Slow(WIDTH, WIDTH))
    with paced(module, step_s=0.03) as pacer:
        for _ in range(4):
            pacer.begin_step(8)
            step(module)
    assert pacer.overruns == 3  # the first step, which finds the layers, is not counted
    late_ms = float(pacer.summary().split("ms on average")[0].split()[-1])
    assert 20 <= late_ms < 100  # the forward has 10 ms and takes 30
    assert 0.6 < pacer.excess < 3  # 20 ms of 30
    assert "3 steps overran" in pacer.summary()
    assert "larger step_s" in pacer.summary()


def test_batches_that_could_not_be_paced_are_reported():
    module = stack()
    with paced(module) as pacer:
        pacer.begin_step(8)
        torch.nn.functional.linear(torch.ones(8, WIDTH), module[0].weight).sum().backward()  # past the module
        pacer.begin_step(8)
        module(torch.ones(8, WIDTH))  # no backward
    assert (pacer.steps, pacer.unpaced_batches) == (0, 2)
    assert "2 batches were NOT paced" in pacer.summary()


def test_a_step_before_attaching_is_refused():
    with pytest.raises(RuntimeError, match="Attach it first"):
        DevicePacer(stack(), step_s=0.1, batch_size=8, speed=1.0).begin_step(8)


def test_a_layer_that_is_unfrozen_later_is_paced_from_its_second_step_on():
    module, ready = stack(), []
    module[0].requires_grad_(False)
    with paced(module, step_s=0.1) as pacer:
        for _ in range(2):
            seconds(pacer, lambda: step(module))
        module[0].requires_grad_(True)
        module[0].weight.register_post_accumulate_grad_hook(lambda weight: ready.append(time.perf_counter()))
        seconds(pacer, lambda: step(module))
        pacer.begin_step(8)
        loss = module(torch.ones(8, WIDTH)).square().sum()
        began = time.perf_counter()
        loss.backward()
        assert ready[-1] - began >= 0.1 * 2 / 3


def test_nothing_is_left_on_the_module_after_detaching():
    module = stack()
    with paced(module, step_s=0.01) as pacer:
        seconds(pacer, lambda: step(module))
        assert module[0]._forward_hooks
    for layer in module:
        assert not layer._forward_hooks
        assert not layer._forward_pre_hooks
        assert not layer.weight._backward_hooks


def _bucket_times(rank, options):
    """When DDP sends each bucket, from the start of backward: one bucket a layer."""
    module = stack()
    model = DistributedDataParallel(module, bucket_cap_mb=WIDTH * WIDTH * 4 / 2**20, **options)
    sent, began = {}, [0.0]

    def hook(state, bucket):
        sent[bucket.index()] = time.perf_counter() - began[0]
        assert bucket.buffer().numel() == WIDTH * WIDTH or len(sent) == 1
        return (
            torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])
        )

    model.register_comm_hook(None, hook)
    with paced(module, step_s=0.3, forward_share=1 / 3) as pacer:
        for _ in range(3):
            sent.clear()
            pacer.begin_step(8)
            loss = model(torch.full((8, WIDTH), 1.0 + rank)).square().sum()
            began[0] = time.perf_counter()
            loss.backward()
            module.zero_grad(set_to_none=not options)
    return sent


@pytest.mark.parametrize(
    "options", [{}, {"gradient_as_bucket_view": True, "static_graph": True}], ids=["plain", "view"]
)
def test_ddp_sends_its_buckets_when_the_device_would(options, run_ranks):
    for sent in run_ranks(_bucket_times, options, world_size=2):
        times = [sent[index] for index in sorted(sent)]
        assert len(times) >= LAYERS - 1
        assert times == sorted(times)
        # the last bucket holds the first layer, and the first one was sent long before that was computed
        assert times[-1] >= 0.2
        assert times[-2] >= 0.15
        assert 0.05 <= times[0] < 0.2


def test_the_speed_of_the_host_is_read_from_its_variable(monkeypatch):
    monkeypatch.delenv("LIGHTNING_COMM_SPEED", raising=False)
    assert emulated_speed() == 1.0
    monkeypatch.setenv("LIGHTNING_COMM_SPEED", "0.25")
    assert emulated_speed() == DevicePacer(stack(), step_s=1, batch_size=1).speed == 0.25
    assert DevicePacer(stack(), step_s=1, batch_size=1, speed=2.0).speed == 2.0


def test_a_device_leaves_a_note_when_it_takes_its_speed_from_the_lab_and_else_none(monkeypatch, tmp_path):
    monkeypatch.setenv("LIGHTNING_COMM_SPEED", "0.25")
    monkeypatch.setenv("LIGHTNING_COMM_SPEED_TAKEN", str(tmp_path / "taken"))
    DevicePacer(stack(), step_s=1, batch_size=1, speed=2)
    assert not (tmp_path / "taken").exists()
    DevicePacer(stack(), step_s=1, batch_size=1)
    assert (tmp_path / "taken").exists()


def test_the_private_name_of_torch_that_ends_a_paced_backward_is_there():
    assert callable(torch.autograd.Variable._execution_engine.queue_callback)


@pytest.mark.parametrize("told", [True, False])
def test_a_wait_inside_a_pass_lengthens_the_step_only_if_the_pacer_is_told(told):
    module, waited_s = stack(), 0.03

    def wait(*_):
        time.sleep(waited_s)
        if told:
            pacer.idle(waited_s)

    with paced(module, step_s=0.12) as pacer:
        module[1].register_forward_pre_hook(wait)
        took_s = [seconds(pacer, lambda: step(module)) for _ in range(4)][1:]
    assert min(took_s) >= 0.12 + waited_s * told
    if not told:
        assert min(took_s) < 0.12 + waited_s  # the layers behind it make up for it


def test_a_pause_between_passes_changes_nothing():
    module = stack()
    with paced(module) as pacer:
        for _ in range(3):
            pacer.begin_step(8)
            pacer.idle(5.0)
            started = time.perf_counter()
            step(module)
            pacer.idle(5.0)
            assert time.perf_counter() - started < 2.0
