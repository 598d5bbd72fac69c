"""A sweep over alpha: rates of every mixture of a pair, and an unbiased choice of alpha."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from logitmix.evaluation.decode import Response
from logitmix.evaluation.metrics import estimate, estimates, rates
from logitmix.evaluation.statistics import Estimate, mcnemar_exact

MIXES = ("logit", "prob", "merge")
MEMBERS = {"policy": 0.0, "anchor": 1.0}  # every mix equals a member at these alphas


@dataclass(frozen=True)
class Choice:
    """The best alpha of a mix, chosen on half of the problems, with its answer rate on the other half.

    `policy` and `anchor` are the members' rates on the other half. `p_value` is that of McNemar's exact test there,
    against the better of the two.
    """

    mix: str
    alpha: float
    chosen_on: Estimate
    reported_on: Estimate
    policy: Estimate
    anchor: Estimate
    p_value: float


def sweep_rates(responses: Sequence[Response]) -> list[dict[str, Any]]:
    """A row for each mix and alpha with `scheme`, `alpha`, the rates, and the ends of their intervals: `format_low`, …

    The responses of `policy` and `anchor` count for every mix, at alpha 0 and 1.
    """
    table = []
    for mix, by_alpha in by_mix(responses).items():
        for alpha, group in sorted(by_alpha.items()):
            line = {"scheme": mix, "alpha": alpha} | asdict(rates(group))
            for key, value in estimates(group).items():
                line |= {f"{key}_low": value.low, f"{key}_high": value.high}
            table.append(line)
    return table


def choose_alpha(responses: Sequence[Response]) -> list[Choice]:
    """For each mix, the alpha with the best answer rate on even-numbered problems, and its rate on the others.

    Among equal rates the smallest alpha wins. The best of many rates is biased on the problems that chose it, and
    unbiased on the other half.

    Raises `ValueError` for fewer than two problems.
    """
    if len({response.problem for response in responses}) < 2:
        raise ValueError(
            "alpha is chosen on half of the problems and reported on the other half; raise --eval_limit above 1"
        )
    choices = []
    for mix, by_alpha in by_mix(responses).items():
        on_even = {alpha: estimate(_half(group, 0), "answer_ok") for alpha, group in sorted(by_alpha.items())}
        alpha = max(on_even, key=lambda candidate: on_even[candidate].value)
        other = {candidate: _half(by_alpha[candidate], 1) for candidate in (alpha, *MEMBERS.values())}
        on_odd = {candidate: estimate(group, "answer_ok") for candidate, group in other.items()}
        better = max(MEMBERS.values(), key=lambda member: on_odd[member].value)
        pairs = [(x.answer_ok, y.answer_ok) for x, y in zip(other[alpha], other[better], strict=True)]
        p_value = mcnemar_exact(pairs.count((True, False)), pairs.count((False, True)))
        choices.append(Choice(mix, alpha, on_even[alpha], on_odd[alpha], on_odd[0.0], on_odd[1.0], p_value))
    return choices


def by_mix(responses: Iterable[Response]) -> dict[str, dict[float, list[Response]]]:
    """Responses of each mix by alpha, each list in the order of the problems."""
    named: dict[str, dict[float, list[Response]]] = {}
    for response in sorted(responses, key=lambda response: response.problem):
        assert response.alpha is not None
        named.setdefault(response.name, {}).setdefault(response.alpha, []).append(response)
    members = {alpha: named[name][alpha] for name, alpha in MEMBERS.items()}
    return {mix: named.get(mix, {}) | members for mix in MIXES if mix in named}


def _half(responses: Sequence[Response], remainder: int) -> list[Response]:
    return [response for response in responses if response.problem % 2 == remainder]
