"""The weights that a request sets by `alpha`, `weights` or `member`; the same for both servers."""

import sys
from typing import Any

from logitmix.mixture.configuration import LogitMixConfig, resolve_weights
from logitmix.serving.alpha_range import validate_in_range

REQUEST_FIELDS = ("alpha", "weights", "member")
MEMBER_PROMPTS = "member_prompts"  # an argument of `generate`


def parse_request_weights(config: LogitMixConfig, fields: dict[str, Any] | None) -> list[float] | None:
    """The weights that a request sets, one per member, or None if it leaves them to the mixture.

    Other keys of `fields` (`extra_args` in vLLM) are ignored. Raises `ValueError` for two of `alpha`, `weights` and
    `member`, an unknown member, weights outside the scheme's domain or the configuration's `alpha_range`, and for
    `member_prompts`.
    """
    if fields and fields.get(MEMBER_PROMPTS) is not None:
        raise ValueError(
            f"a server gives all members the same prompt, so a request cannot set {MEMBER_PROMPTS}; leave it out, or "
            "generate with transformers: model.generate(…, member_prompts=…)"
        )
    given = {key: fields[key] for key in REQUEST_FIELDS if fields and fields.get(key) is not None}
    if not given:
        return None
    if len(given) > 1:
        raise ValueError(f"the request sets {' and '.join(given)}; set only one of them")
    ((key, value),) = given.items()
    if key == "member":
        member = config.resolve_member_name(value)
        return [float(name == member) for name in config.members]
    if key == "weights" and not (isinstance(value, list) and all(map(_is_number, value))):
        raise ValueError(f"weights is {value!r}, but must be a list of numbers")
    if key == "alpha" and not _is_number(value):
        raise ValueError(f"alpha is {value!r}, but must be a number")
    alpha, weights = (value, None) if key == "alpha" else (None, value)
    resolved = resolve_weights(alpha, weights, num_members=len(config.members), scheme=config.scheme).tolist()
    if getattr(config, "alpha_range", None) is not None:
        validate_in_range(config.alpha_range, [value] if key == "alpha" else resolved[1:])
    return resolved


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
