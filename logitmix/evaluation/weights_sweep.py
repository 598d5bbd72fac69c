"""A sweep over the weights of K members: along a preset's alpha, or over the simplex of all ensembles."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from logitmix.evaluation.metrics import estimate, group_by
from logitmix.evaluation.requests import Response, one_hot_weights
from logitmix.evaluation.statistics import Estimate, mcnemar_exact
from logitmix.mixture.presets import Preset

# A grid of more points than this is no small search
MAX_POINTS = 200


@dataclass(frozen=True)
class WeightsChoice:
    """The best weights, chosen on half of the problems, with their answer rate on the other half.

    `best_member` is the member with the best rate on the other half, `member` that rate, and `p_value` that of
    McNemar's exact test of the two there.
    """

    name: str
    weights: list[float]
    chosen_on: Estimate
    reported_on: Estimate
    best_member: str
    member: Estimate
    p_value: float


def preset_points(preset: Preset, alphas: Sequence[float]) -> dict[str, list[float]]:
    """The preset's weights at each alpha, by name. Raises `ValueError` for an alpha that it does not take."""
    return {f"{preset.name} {alpha:g}": preset.weights(alpha) for alpha in sorted(set(alphas))}


def simplex_points(num_members: int, parts: int, scheme: str) -> dict[str, list[float]]:
    """All weights of multiples of 1 / `parts` that sum to 1, but for the members alone, by name.

    There are `C(parts + K - 1, K - 1) - K`. Raises `ValueError` for `parts` below 2, or more than `MAX_POINTS`.
    """
    if parts < 2:
        raise ValueError(
            f"simplex_parts is {parts}, but must be at least 2: weights are multiples of 1 / simplex_parts"
        )
    grid = [counts for counts in _compositions(parts, num_members) if max(counts) < parts]
    if len(grid) > MAX_POINTS:
        raise ValueError(
            f"simplex_parts {parts} gives {len(grid)} weights of {num_members} members, but a sweep takes at most "
            f"{MAX_POINTS}; lower it"
        )
    return {f"{scheme} {'/'.join(f'{c / parts:.3g}' for c in counts)}": [c / parts for c in counts] for counts in grid}


def choose_weights(
    responses: Sequence[Response], points: Mapping[str, list[float]], members: Sequence[str]
) -> WeightsChoice:
    """The point with the best answer rate on even-numbered problems, and its rate on the others.

    Members alone are points too, before the others; among equal rates the first point wins. The best of many rates is
    biased on the problems that chose it, and unbiased on the other half.
    """
    groups = group_by(responses, "name")
    candidates = one_hot_weights(members) | dict(points)
    even, odd = ({n: [r for r in groups[n] if r.problem % 2 == half] for n in candidates} for half in (0, 1))
    best = max(candidates, key=lambda name: estimate(even[name], "answer_ok").value)
    on_odd = {name: estimate(odd[name], "answer_ok") for name in (best, *members)}
    member = max(members, key=lambda name: on_odd[name].value)
    pairs = [(x.answer_ok, y.answer_ok) for x, y in zip(odd[best], odd[member], strict=True)]
    p_value = mcnemar_exact(pairs.count((True, False)), pairs.count((False, True)))
    chosen = estimate(even[best], "answer_ok")
    return WeightsChoice(best, candidates[best], chosen, on_odd[best], member, on_odd[member], p_value)


def _compositions(total: int, terms: int) -> list[tuple[int, ...]]:
    """All tuples of `terms` integers of at least 0 with this sum, in rising order."""
    if terms == 1:
        return [(total,)]
    return [(first, *rest) for first in range(total + 1) for rest in _compositions(total - first, terms - 1)]
