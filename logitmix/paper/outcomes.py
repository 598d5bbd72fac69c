"""Which problems were right: packed into the lines of result files, and looked up again, seed by seed.

Shape legend: S seeds, N problems.
"""

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

KEYS = ("format_ok", "answer_ok", "lenient_ok")


def pack(right: Iterable[bool]) -> str:
    """One bit a problem, in order, as hexadecimal digits; the first problem is the highest bit of the first digit.

    >>> pack([True, False, False, True, True])
    '98'
    """
    return np.packbits(np.fromiter(right, dtype=bool)).tobytes().hex()


def unpack(digits: str, n: int) -> NDArray[np.bool_]:
    """The first n bits of `pack`, a problem each. Raises `ValueError` where there are not so many."""
    packed = np.frombuffer(bytes.fromhex(digits), dtype=np.uint8)
    if len(packed) != -(-n // 8):
        raise ValueError(f"{digits[:20]!r}… holds {8 * len(packed)} bits, which are not those of {n} problems")
    return np.unpackbits(packed, count=n).astype(bool)


def packed_outcomes(responses: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """`format_ok`, `answer_ok` and `lenient_ok` of graded responses, one a problem, packed in the problems' order."""
    rows = sorted(responses, key=lambda row: row["problem"])
    return {key: pack(row[key] for row in rows) for key in KEYS}


class Outcomes:
    """Which problems were right, by seed, from the rows of a reproduction's `results.jsonl`.

    Rows with `what` "evaluation" have `seed`, `arm`, `step` and `name`, those with "sweep" `seed`, `scheme` and
    `alpha`; both have `n` and packed outcomes. What one seed has the others must have too.
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
        """Problems of every evaluation. Raises `ValueError` where they differ."""
        sizes = {int(row["n"]) for by_seed in self._rows.values() for row in by_seed.values()}
        if len(sizes) != 1:
            raise ValueError(f"evaluations of {sorted(sizes)} problems cannot be compared; use one --eval_limit")
        return sizes.pop()

    def steps(self, arm: str) -> list[int]:
        """Steps at which the arm was evaluated, from the first to the last."""
        return sorted({key[1] for key in self._rows if len(key) == 3 and key[0] == arm})

    def alphas(self, scheme: str) -> list[float]:
        return sorted({key[1] for key in self._rows if len(key) == 2 and key[0] == scheme})

    def evaluated(self, arm: str, name: str, step: int, key: str = "answer_ok") -> NDArray[np.float64]:
        """`[S, N]`: 1 where that member of the arm had the problem right at that step."""
        return self._scores((arm, step, name), key)

    def trained(self, arm: str, step: int, key: str = "answer_ok") -> NDArray[np.float64]:
        """`[S, N]` of what the arm trains: its mixture, or its model where it has no anchor."""
        return self.evaluated(arm, "mixture" if (arm, step, "mixture") in self._rows else "model", step, key)

    def anchor(self, key: str = "answer_ok") -> NDArray[np.float64]:
        """`[S, N]` of the SFT model, which is frozen."""
        return self.evaluated("fixed_mixing", "anchor", self.steps("fixed_mixing")[0], key)

    def swept(self, scheme: str, alpha: float, key: str = "answer_ok") -> NDArray[np.float64]:
        """`[S, N]` of the untrained pair, mixed by that scheme at that alpha."""
        return self._scores((scheme, alpha), key)

    def _scores(self, which: tuple[Any, ...], key: str) -> NDArray[np.float64]:
        by_seed = self._rows.get(which, {})
        missing = [seed for seed in self.seeds if seed not in by_seed]
        if missing:
            what = " ".join(map(str, which))
            raise ValueError(f"there are no results of {what} for seeds {missing}; run the reproduction to its end")
        return np.array([unpack(by_seed[seed][key], self.n) for seed in self.seeds], dtype=float)
