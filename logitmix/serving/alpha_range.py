"""The range of alpha that a server takes. Imports no library, so that the command refuses a wrong one at once."""

from collections.abc import Sequence
from typing import Any


def validate_alpha_range(alpha_range: Any) -> None:
    """Raise `ValueError` for a range of alpha that is not two numbers, the lower first."""
    numbers = alpha_range if isinstance(alpha_range, list | tuple) else []
    is_pair = len(numbers) == 2 and all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers)
    if not is_pair or not numbers[0] <= numbers[1]:  # also refuses NaN
        raise ValueError(f"alpha_range is {alpha_range!r}, but must be two numbers, the lower first")


def validate_in_range(alpha_range: Sequence[float], anchor_weights: Sequence[float]) -> None:
    """Raise `ValueError` for a weight of an anchor outside the range."""
    lowest, highest = alpha_range
    for alpha in anchor_weights:
        if not lowest <= alpha <= highest:
            raise ValueError(f"alpha is {alpha}, but this server takes {lowest} to {highest}")
