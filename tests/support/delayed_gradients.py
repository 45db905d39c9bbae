"""Cyclic Data Parallelism emulated by delayed gradients: an oracle without versions and without a schedule.

Every rank has a whole model of its own. All compute at the same time, their gradients are averaged, and each rank gives
each stage either this average, or, where it lags, the one of the step before.
"""

import copy
from fractions import Fraction

import torch


def lags(worker: int, stage: int, workers: int, stages: int, rule: str, lag: int) -> bool:
    """The rule as the paper and the brief formula state it: worker i and stage j count from 1."""
    i, j = worker + 1, stage + 1
    if rule == "v1":
        return True
    if lag:
        return i + j < workers + 1 + lag
    return Fraction(j - 1, stages) < Fraction(workers - i, workers)


def ring_order(stage: int, workers: int, stages: int) -> list[int]:
    """Whose gradients are added one after the other: the owner's, who needs the sum, is the last."""
    owner = workers - stage * workers // stages  # from 1
    return [*range(owner, workers), *range(owner)]


class Emulation:
    """Trains ``workers`` copies of a network.

    Args:
        network: Copied.
        names: Its parameters' names by stage.
        make: Makes an optimizer from a list of parameters; each rank has one for each stage.
    """

    def __init__(self, network, names, make, workers, rule="v2", lag=0, warmup=0, factor=None):
        self.models = [copy.deepcopy(network) for _ in range(workers)]
        self.names, self.workers, self.rule, self.lag, self.warmup = names, workers, rule, lag, warmup
        self.optimizers = [[make([model.get_parameter(n) for n in stage]) for stage in names] for model in self.models]
        self.factor = factor or (lambda step: 1.0)
        self.rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers[0]]
        self.waiting = {}
        self.step = 0

    def lags(self, worker, stage):
        # a worker that computes step t with version t has applied the average of step t - 1 by then
        synchronous = self.step + 1 < self.warmup
        return not synchronous and lags(worker, stage, self.workers, len(self.names), self.rule, self.lag)

    def take_step(self, micro_batches, loss):
        losses = []
        for model, micro_batch in zip(self.models, micro_batches, strict=True):
            model.zero_grad()
            value = loss(model, micro_batch)
            value.backward()
            losses.append(float(value.detach()))
        gradients = [{name: p.grad for name, p in model.named_parameters()} for model in self.models]
        for stage, names in enumerate(self.names):
            order = ring_order(stage, self.workers, len(self.names))
            average = [sum(gradients[w][n] / self.workers for w in order) for n in names]
            for worker in range(self.workers):
                previous = self.waiting.pop((worker, stage), None)
                if previous is not None:
                    self.apply(worker, stage, previous)
                if self.lags(worker, stage):
                    self.waiting[worker, stage] = (average, self.step)
                else:
                    self.apply(worker, stage, (average, self.step))
        self.step += 1
        return tuple(losses)

    def apply(self, worker, stage, what):
        average, step = what
        model, optimizer = self.models[worker], self.optimizers[worker][stage]
        for name, parameter in model.named_parameters():
            parameter.grad = None
            if name in self.names[stage]:
                parameter.grad = average[self.names[stage].index(name)].clone()
        for group, rate in zip(optimizer.param_groups, self.rates[stage], strict=True):
            group["lr"] = rate * self.factor(step)
        optimizer.step()

    @torch.no_grad()
    def flush(self):
        for (worker, stage), what in self.waiting.items():
            self.apply(worker, stage, what)
        self.waiting = {}
        for together in zip(*(model.buffers() for model in self.models), strict=True):
            mean = sum(together) / self.workers if together[0].is_floating_point() else together[0].clone()
            for buffer in together:
                buffer.copy_(mean)
