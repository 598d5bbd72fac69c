"""A sweep over alpha: how good each mixture of one pair is, and which alpha to choose without flattering it."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from logitmix.evaluation.metrics import estimate, rates
from logitmix.evaluation.statistics import Estimate, mcnemar_exact

MIXES = ("logit", "prob", "merge")
MEMBERS = {"policy": 0.0, "anchor": 1.0}  # what every mix is at these alphas

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Choice:
    """The best alpha of one mix: chosen on half of the problems, its answer rate on the other half.

    `policy` and `anchor` are the members' rates on that other half, and `p_value` is McNemar's exact test there
    against the better of the two.
    """

    mix: str
    alpha: float
    chosen_on: Estimate
    reported_on: Estimate
    policy: Estimate
    anchor: Estimate
    p_value: float


def merge_weights(policy: PreTrainedModel, anchor: PreTrainedModel) -> PreTrainedModel:
    """A copy of the policy to put merged weights in, see `set_merge`; frozen, in evaluation mode.

    Raises `ValueError` for models whose weights differ in name or shape.
    """
    if policy is anchor:
        raise ValueError(
            "policy and anchor share one model with adapters, whose weights cannot be merged as they are; leave the "
            "merge out, with --mixes logit prob"
        )
    shapes = [{name: tuple(weight.shape) for name, weight in m.named_parameters()} for m in (policy, anchor)]
    if shapes[0] != shapes[1]:
        differ = min(name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name))
        raise ValueError(
            f"the weights of policy and anchor cannot be merged: {differ} is "
            f"{shapes[0].get(differ, 'missing')} in one and {shapes[1].get(differ, 'missing')} in the other; leave "
            "the merge out, with --mixes logit prob"
        )
    return copy.deepcopy(policy).requires_grad_(False).eval()


@torch.no_grad()
def set_merge(merged: PreTrainedModel, policy: PreTrainedModel, anchor: PreTrainedModel, alpha: float) -> None:
    """Give `merged` the weights `(1 - alpha) θ_policy + alpha θ_anchor`, computed in float32: one model, not two."""
    parameters = (model.parameters() for model in (merged, policy, anchor))
    for into, ours, theirs in zip(*parameters, strict=True):
        into.copy_(torch.lerp(ours.float(), theirs.to(ours.device).float(), alpha))


def sweep_rates(responses: Rows) -> list[dict[str, Any]]:
    """A row for each mix and alpha: `scheme`, `alpha`, the rates, and the ends of their intervals.

    The members alone, in the responses as `policy` and `anchor`, are every mix at alpha 0 and 1.
    """
    table = []
    for mix, by_alpha in by_mix(responses).items():
        for alpha, rows in sorted(by_alpha.items()):
            line = {"scheme": mix, "alpha": alpha} | asdict(rates(rows))
            for key in ("format", "answer"):
                value = estimate(rows, f"{key}_ok")
                line |= {f"{key}_low": value.low, f"{key}_high": value.high}
            table.append(line)
    return table


def choose_alpha(responses: Rows) -> list[Choice]:
    """For each mix the alpha of the best answer rate on the even-numbered problems, and its rate on the others.

    Of several as good it is the smallest. The best of many rates flatters on the problems that chose it; the other
    half does not know of the choice.

    Raises `ValueError` for fewer than two problems.
    """
    if len({row["problem"] for row in responses}) < 2:
        raise ValueError(
            "alpha is chosen on half of the problems and reported on the other; raise --eval_limit above 1"
        )
    choices = []
    for mix, by_alpha in by_mix(responses).items():
        on_even = {alpha: estimate(_half(rows, 0), "answer_ok") for alpha, rows in sorted(by_alpha.items())}
        alpha = max(on_even, key=lambda candidate: on_even[candidate].value)
        other = {candidate: _half(by_alpha[candidate], 1) for candidate in (alpha, *MEMBERS.values())}
        on_odd = {candidate: estimate(rows, "answer_ok") for candidate, rows in other.items()}
        better = max(MEMBERS.values(), key=lambda member: on_odd[member].value)
        pairs = [
            (bool(x["answer_ok"]), bool(y["answer_ok"])) for x, y in zip(other[alpha], other[better], strict=True)
        ]
        p_value = mcnemar_exact(pairs.count((True, False)), pairs.count((False, True)))
        choices.append(Choice(mix, alpha, on_even[alpha], on_odd[alpha], on_odd[0.0], on_odd[1.0], p_value))
    return choices


def by_mix(responses: Iterable[Mapping[str, Any]]) -> dict[str, dict[float, list[Mapping[str, Any]]]]:
    """Responses of each mix by alpha, those of a problem in the same place of every list."""
    named: dict[str, dict[float, list[Mapping[str, Any]]]] = {}
    for row in sorted(responses, key=lambda row: row["problem"]):
        named.setdefault(row["name"], {}).setdefault(row["alpha"], []).append(row)
    members = {alpha: named[name][alpha] for name, alpha in MEMBERS.items()}
    return {mix: named.get(mix, {}) | members for mix in MIXES if mix in named}


def _half(rows: Rows, remainder: int) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["problem"] % 2 == remainder]
