"""Private parts of torch: of DDP, of gradient scalers, and those that lower layers touch."""

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_comm.lightning_internals.patches import Internal

_BUCKET = "torch._C._distributed_c10d.GradBucket"

INTERNALS = (
    Internal("torch.optim.Adam", "_step_supports_amp_scaling", "whether a call of `step` is one, under a scaler"),
    Internal("torch.amp.GradScaler", "_get_scale_async", "whether the scale may have changed, without a read of it"),
    Internal(
        "torch.nn.parallel.DistributedDataParallel",
        "_build_params_for_reducer",
        "the order in which DDP numbers parameters",
    ),
    Internal("torch.nn.parallel.DistributedDataParallel", "_comm_hooks", "whether DDP makes means by itself"),
    Internal(
        "torch._C._distributed_c10d.Reducer",
        "_get_local_used_map",
        "how many ranks have used each of them, and so whose gradients DDP throws away",
    ),
    Internal(
        "torch.autograd",
        "_unsafe_preserve_version_counter",
        "weights that are put aside for a checkpoint and back, between forward and backward, have not changed",
        elsewhere=("ondevice/own_values.py",),
    ),
    Internal(
        "torch.Tensor",
        "_version",
        "whether something has been written in place, for which nothing is read",
        elsewhere=("ondevice/", "strategies/"),
    ),
    Internal("torch", "_foreach_add_", "many small tensors in one call", elsewhere=("transport/",)),
    Internal("torch", "_foreach_sub_", "the same", elsewhere=("transport/",)),
    Internal("torch", "_foreach_copy_", "the same", elsewhere=("ondevice/",)),
    Internal("torch", "_foreach_norm", "the same", elsewhere=("ondevice/", "transport/")),
    Internal(
        "torch.distributed.distributed_c10d._World",
        "pg_map",
        "which process groups there are, to leave them all",
        elsewhere=("transport/group_ends.py",),
    ),
    Internal(
        "torch.distributed.distributed_c10d",
        "_world",
        "the same",
        elsewhere=("transport/group_ends.py",),
    ),
    Internal(
        "torch.distributed.distributed_c10d",
        "_get_default_store",
        "the store that ranks agree on stops in, and are watched by",
        elsewhere=("transport/store_client.py",),
    ),
    Internal("torch.utils._python_dispatch", "TorchDispatchMode", "sees messages", elsewhere=("ondevice/optimizer/",)),
    Internal("torch.nn.modules.batchnorm", "_BatchNorm", "BatchNorm of every kind", elsewhere=("callbacks/",)),
    Internal("torch.nn.modules.conv", "_ConvNd", "convolutions of every kind", elsewhere=("lab/",)),
    Internal(_BUCKET, "buffer", "what DDP hands its hook", elsewhere=("transport/ddp_hook.py",)),
    Internal(_BUCKET, "parameters", "the same", elsewhere=("transport/ddp_hook.py",)),
)


def averages_without_a_hook(model: object) -> bool:
    """Whether DDP averages gradients itself, and not a communication hook that was registered."""
    return isinstance(model, DistributedDataParallel) and not model._comm_hooks


def unused_by_all_ranks(model: DistributedDataParallel) -> Callable[[], list[Parameter]]:
    """Return a function that returns the parameters that no rank has used in the last synchronised backward.

    Call this right after the model was wrapped, when DDP numbers the parameters that are trained.

    Note:
        *Communication.* None: DDP's reducer has counted over all ranks. On CUDA the function waits for the device.

    """
    parameters: list[Parameter] = model._build_params_for_reducer()[0]  # type: ignore[no-untyped-call]

    def unused() -> list[Parameter]:
        used: Tensor | None = cast(Any, model.reducer)._get_local_used_map()
        if used is None:  # DDP does not look for unused parameters
            return []
        return [each for each, ranks in zip(parameters, used.tolist(), strict=True) if ranks == 0]

    return unused


def scale_on_device(scaler: Any) -> Tensor | None:
    """Return the tensor in which a gradient scaler keeps its scale, unread; ``None`` before it has made it."""
    return scaler._get_scale_async() if isinstance(scaler, GradScaler) else None


def sees_to_infinities(optimizer: Optimizer) -> bool:
    """Whether an optimizer skips steps with infinite gradients itself, on the device: a scaler always calls it."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))
