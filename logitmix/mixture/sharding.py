"""Weights that are split over processes and gathered by all of them together, in each forward pass."""

from collections.abc import Iterable

from torch import nn
from torch.distributed.fsdp import FSDPModule


def are_sharded(models: Iterable[nn.Module]) -> bool:
    """Whether FSDP2 or DeepSpeed's ZeRO-3 splits the weights of one of the models.

    Each process then has to run each of them equally often, whatever its own batch is: a pass that one of them leaves
    out is one for which the others wait.
    """
    return any(isinstance(model, FSDPModule) or hasattr(next(model.parameters(), None), "ds_id") for model in models)
