"""One model of two: the average of their weights."""

import copy

import torch
from transformers import PreTrainedModel

MERGED = "merged"  # the name of the merged weights among policy and anchors


def merge_weights(policy: PreTrainedModel, anchor: PreTrainedModel, way_out: str) -> PreTrainedModel:
    """A frozen copy of the policy in evaluation mode, to hold merged weights; see `set_merge`.

    Raises what `validate_mergeable` does.
    """
    validate_mergeable(policy, anchor, way_out)
    return copy.deepcopy(policy).requires_grad_(False).eval()


def validate_mergeable(policy: PreTrainedModel, anchor: PreTrainedModel, way_out: str) -> None:
    """Raise `ValueError`, whose last words are `way_out`, for models whose weights differ in name or shape."""
    if policy is anchor:
        raise ValueError(f"policy and anchor share one model, whose weights cannot be merged; {way_out}")
    shapes = [{name: tuple(weight.shape) for name, weight in m.named_parameters()} for m in (policy, anchor)]
    if shapes[0] != shapes[1]:
        differ = min(name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name))
        raise ValueError(
            f"the weights of policy and anchor cannot be merged: {differ} is "
            f"{shapes[0].get(differ, 'missing')} in one and {shapes[1].get(differ, 'missing')} in the other; {way_out}"
        )


@torch.no_grad()
def set_merge(merged: PreTrainedModel, policy: PreTrainedModel, anchor: PreTrainedModel, alpha: float) -> None:
    """Set the weights of `merged` to `(1 - alpha) θ_policy + alpha θ_anchor`, computed in float32."""
    parameters = (model.parameters() for model in (merged, policy, anchor))
    for into, ours, theirs in zip(*parameters, strict=True):
        into.copy_(torch.lerp(ours.float(), theirs.to(ours.device).float(), alpha))
