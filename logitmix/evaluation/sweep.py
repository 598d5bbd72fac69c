"""A sweep over alpha: rates of every mixture of a pair, and an unbiased choice of alpha."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from logitmix.evaluation.metrics import estimate, estimates, rates
from logitmix.evaluation.requests import Response
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

    Among equal rates the smallest alpha wins. Alphas that successive halving dropped are not candidates. The best of
    many rates is biased on the problems that chose it, and unbiased on the other half.

    Raises `ValueError` for fewer than two problems.
    """
    if len({response.problem for response in responses}) < 2:
        raise ValueError(
            "alpha is chosen on half of the problems and reported on the other half; raise --eval_limit above 1"
        )
    choices = []
    for mix, by_alpha in by_mix(responses).items():
        whole = max(map(len, by_alpha.values()))
        on_even = {
            alpha: estimate(_half(group, 0), "answer_ok")
            for alpha, group in sorted(by_alpha.items())
            if len(group) == whole
        }
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


@dataclass(frozen=True)
class Round:
    """A round of successive halving: this many alphas are decoded on the problems from `start` to before `stop`."""

    num_alphas: int
    start: int
    stop: int


def plan_rounds(num_alphas: int, num_problems: int, first: int | None) -> list[Round]:
    """Successive halving (Karnin et al. 2013): all alphas on the first problems, then the better half on twice as many
    in all, and so on; the alphas of the last round are decoded on all problems. Without `first`, one round of all.

    Raises `ValueError` for a first round of fewer than 4 problems, or of more than there are.
    """
    if first is None:
        return [Round(num_alphas, 0, num_problems)]
    if not 4 <= first <= num_problems:
        raise ValueError(
            f"halve_from is {first}, but the first round needs at least 4 problems and at most the {num_problems} of "
            "the sweep"
        )
    rounds, start, stop = [], 0, first
    while start < num_problems:
        if num_alphas <= 1:
            stop = num_problems
        rounds.append(Round(num_alphas, start, min(stop, num_problems)))
        num_alphas, start, stop = -(-num_alphas // 2), rounds[-1].stop, 2 * stop
    return rounds


def best_alphas(responses: Iterable[Response], mix: str, alphas: Sequence[float], count: int) -> list[float]:
    """The `count` alphas of a mix with the best answer rate so far, in rising order; among equal rates those with the
    better lenient rate, then the smaller ones.

    Only even-numbered problems count, so that the rate on the others stays unbiased (`choose_alpha`).
    """
    even = [response for response in responses if response.name == mix and response.problem % 2 == 0]

    def key(alpha: float) -> tuple[float, float, float]:
        r = rates(response for response in even if response.alpha == alpha)
        return (-r.answer, -r.lenient, alpha)

    return sorted(sorted(alphas, key=key)[:count])


def dropped_notes(responses: Sequence[Response]) -> list[str]:
    """A line for each mix with alphas that halving dropped: on how many problems each was decoded."""
    notes = []
    for mix, by_alpha in by_mix(responses).items():
        counts = {alpha: len(group) for alpha, group in sorted(by_alpha.items())}
        dropped = [alpha for alpha in counts if counts[alpha] < max(counts.values())]
        if dropped:
            on = [
                f"{', '.join(f'{alpha:g}' for alpha in dropped if counts[alpha] == n)} after {n} problems"
                for n in sorted({counts[alpha] for alpha in dropped})
            ]
            notes.append(f"{mix}: dropped alpha {'; '.join(on)}.")
    return notes


def _half(responses: Sequence[Response], remainder: int) -> list[Response]:
    return [response for response in responses if response.problem % 2 == remainder]
