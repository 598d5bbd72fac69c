"""Which problems were right in a reproduction, by seed, arm, member, step and alpha.

Shape legend: S seeds, N problems.
"""

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitmix.evaluation.outcomes import unpack


class Outcomes:
    """Which problems were right, from the rows of a reproduction's `results.jsonl`.

    Rows whose `what` is "evaluation" have `seed`, `arm`, `step` and `name`; those of a "sweep" have `seed`, `scheme`
    and `alpha`. Both have `n` and packed outcomes. Every seed must have the same rows.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._rows: dict[tuple[Any, ...], dict[int, Mapping[str, Any]]] = {}
        for row in rows:
            if row["what"] in ("evaluation", "sweep"):
                names = ("arm", "step", "name") if row["what"] == "evaluation" else ("scheme", "alpha")
                self._rows.setdefault(tuple(row[name] for name in names), {})[row["seed"]] = row

    @cached_property
    def seeds(self) -> list[int]:
        return sorted({seed for by_seed in self._rows.values() for seed in by_seed})

    @cached_property
    def n(self) -> int:
        """The number of problems in every evaluation. Raises `ValueError` if evaluations differ."""
        sizes = {int(row["n"]) for by_seed in self._rows.values() for row in by_seed.values()}
        if len(sizes) != 1:
            raise ValueError(f"evaluations of {sorted(sizes)} problems cannot be compared; use one --eval_limit")
        return sizes.pop()

    def steps(self, arm: str) -> list[int]:
        """The steps at which the arm was evaluated, in order."""
        return sorted({key[1] for key in self._rows if len(key) == 3 and key[0] == arm})

    def alphas(self, scheme: str) -> list[float]:
        return sorted({key[1] for key in self._rows if len(key) == 2 and key[0] == scheme})

    def member_scores(self, arm: str, name: str, step: int, key: str = "answer_ok") -> NDArray[np.float64]:
        """`[S, N]`: 1 where the named member of the arm had the problem right at that step, else 0."""
        return self._stack_seeds((arm, step, name), key)

    def arm_scores(self, arm: str, step: int, key: str = "answer_ok") -> NDArray[np.float64]:
        """`[S, N]` of the arm's mixture, or of its model if it has no anchor."""
        return self.member_scores(arm, "mixture" if (arm, step, "mixture") in self._rows else "model", step, key)

    def single_model_scores(self, arm: str, key: str = "answer_ok") -> NDArray[np.float64]:
        """`[S, N]` of the one model that is left after the arm: its policy, or its model if it has no anchor."""
        last = self.steps(arm)[-1]
        return self.member_scores(arm, "policy" if (arm, last, "policy") in self._rows else "model", last, key)

    def anchor_scores(self, key: str = "answer_ok") -> NDArray[np.float64]:
        """`[S, N]` of the SFT model; it is frozen, so at any step."""
        return self.member_scores("fixed_mixing", "anchor", self.steps("fixed_mixing")[0], key)

    def sweep_scores(self, scheme: str, alpha: float, key: str = "answer_ok") -> NDArray[np.float64]:
        """`[S, N]` of the untrained pair, mixed by the scheme at alpha."""
        return self._stack_seeds((scheme, alpha), key)

    def _stack_seeds(self, which: tuple[Any, ...], key: str) -> NDArray[np.float64]:
        by_seed = self._rows.get(which, {})
        missing = [seed for seed in self.seeds if seed not in by_seed]
        if missing:
            what = " ".join(map(str, which))
            raise ValueError(f"there are no results of {what} for seeds {missing}; let the reproduction finish")
        return np.array([unpack(by_seed[seed][key], self.n) for seed in self.seeds], dtype=float)
