"""What the page of `adaptive_partition.py` says of itself and of each part, with room for the figures of its set-up."""

INTRODUCTIONS = {
    "": """\
What `AdaptivePartition` gains over even shares, how near it comes to the exact optimum, and what it costs where there
is nothing to gain. DDP over gloo, one thread a rank, `PartitionedLoader`, windows of 20 steps. All arms of a
comparison run one after the other in the same processes, in an order that rotates from repeat to repeat; ratios are
paired by repeat: median, and lowest to highest. The JSON file beside this page has every repeat.

*even*: `mode="fixed"` with even shares. *balanced*: `mode="balance"`, from even shares on. *optimum*: `mode="fixed"`
from the start at the whole numbers of samples that `solve_partition` finds for the known speeds.""",
    "speeds": """\
Ranks on this machine over loopback. **Devices are emulated** by sleeping: a batch takes time in proportion to its
samples, {even_ms:g} ms on the slowest rank at an even share of {samples} samples, so the processor is idle for most
of a step. What one becomes 3 times slower does so in mid-run, in the middle of a window; its row is of what follows,
and *optimum* is of the speeds after it.

*even, balanced, optimum*: median step once it is steady, from the start of a batch to that of the next on rank 0; of
*balanced* the last 40 steps. *mean / least speed*: the closed form of the gain, without any other time in a step.
*expected*: `step_speedup` for these speeds in whole samples, with the time that the even step of the same repeat had
beside its slowest rank. *measured gain*: even over balanced. *of the optimum*: even over optimum. *windows until
within 5 %*: the first window whose median step is at most 5 % longer than the optimum of the same repeat, for each
repeat, counted from the first batch that a plan could hold from; after a change of speed from the comparison of the
first window that lies behind the change as a whole. *moves*: how often shares moved, in the last row after the
change.""",
    "jitter": """\
Ranks of equal speed that sleep {jitter} a step, more or less by {jitter_percent:g} % (normal, independent, the same
draws with and without balancing), {windows} windows. *even, balanced*: mean step. *cost*: by how much longer the
balanced one is, in pairs. On {cores} cores what Lightning computes for all ranks is part of a step.""",
    "overhead": """\
Two ranks sleep {sleep_ms:g} ms a step and train 200 small tensors for real, without the callback, with
`mode="observe"`, and again without, {overhead_steps} steps each. *with it*: by how much longer the mean step is than
the mean of both without. *counted inside*: processor time of the callback's hooks on rank 0, as a share of a step.""",
    "contention": """\
Two emulated hosts, 1 Gbit/s, a core each; a ViT of 202,186 parameters (0.8 MB) on 192 images of 8 x 8 a step, with
real compute. Host 1 is slowed: a process stops and continues the rank (SIGSTOP, SIGCONT), with its threads that
communicate; or a busy process shares its core. In each repeat both hosts first compute alone, at the same time but
without messages: a line through three sizes of batch gives each rank's cost, from which *mean / least speed* (at an
even share), *expected* and *optimum* follow. The disturbance has no steady strength, so that optimum can be beaten.
Columns as above.""",
}
