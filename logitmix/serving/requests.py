"""Where a request's alpha enters: the weights that `alpha`, `weights` or `member` of a request stand for."""

import sys
from typing import Any

from logitmix.mixture.configuration import LogitMixConfig, resolve_weights

KEYS = ("alpha", "weights", "member")


def request_weights(config: LogitMixConfig, extra_args: dict[str, Any] | None) -> list[float] | None:
    """The weights that a request sets, or None if it leaves them to the mixture.

    Raises `ValueError` for more than one of the keys, an unknown member, and weights outside the scheme's domain or
    the configuration's `alpha_range`.
    """
    given = {key: extra_args[key] for key in KEYS if extra_args and extra_args.get(key) is not None}
    if not given:
        return None
    if len(given) > 1:
        raise ValueError(f"pass one of {', '.join(given)}, not {len(given)}")
    if "member" in given:
        member = config.resolve_member_name(given["member"])
        return [float(name == member) for name in config.members]
    ((key, value),) = given.items()
    is_list = isinstance(value, list)
    if is_list != (key == "weights") or not all(map(_is_number, value if is_list else [value])):
        raise ValueError(f"{key} is {value!r}, but must be {'a list of numbers' if key == 'weights' else 'a number'}")
    weights = resolve_weights(
        **({"alpha": None, "weights": None} | given), num_members=len(config.members), scheme=config.scheme
    ).tolist()
    alpha_range = getattr(config, "alpha_range", None)
    if alpha_range is not None:
        for alpha in [value] if key == "alpha" else weights[1:]:
            if not alpha_range[0] <= alpha <= alpha_range[1]:
                raise ValueError(f"alpha is {alpha}, but this server takes {alpha_range[0]} to {alpha_range[1]}")
    return weights


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
