"""Checks that rollouts are sampled from the distribution that is scored: `softmax(logits / temperature)`.

With `score_truncated` it is that of the kept tokens. A value that would sample from another one is refused. What
remains are limits on when a rollout may end.
"""

from collections.abc import Collection, Mapping
from typing import Any

from logitmix.training.config import LogitMixGRPOConfig

# The values of an option, and of a key of `generation_kwargs`, that leave the distribution as it is
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_k": (0, -1, None),
    "top_p": (1.0, None),
    "min_p": (0.0, None),
    "repetition_penalty": (1.0, None),
    "vllm_structured_outputs_regex": (None,),
    "neftune_noise_alpha": (None, 0.0),
}
TRUNCATING = ("top_k", "top_p", "min_p")
_NEUTRAL_IN_GENERATE: dict[str, tuple[Any, ...]] = {
    **{name: NEUTRAL[name] for name in ("top_k", "top_p", "min_p", "repetition_penalty")},
    **dict.fromkeys(("typical_p", "encoder_repetition_penalty", "guidance_scale", "length_penalty"), (1.0, None)),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "diversity_penalty"), (0.0, None)),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "top_h"), (0, None)),
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), (1, None)),
    "do_sample": (True,),
}
_NEUTRAL_IN_VLLM: dict[str, tuple[Any, ...]] = {
    **{name: NEUTRAL[name] for name in ("top_k", "top_p", "min_p", "repetition_penalty")},
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), (0.0, None)),
    "n": (1, None),
}
# Keys of `generation_kwargs` that only limit where a rollout may end, or do not concern the distribution at all
ENDS = ("min_new_tokens", "suppress_tokens", "min_length", "max_time")
ENDS_IN_VLLM = ("min_new_tokens", "min_tokens", "ignore_eos", "stop", "stop_token_ids", "include_stop_str_in_output")
_HARMLESS = ("use_cache", "pad_token_id", "bos_token_id", "renormalize_logits", "remove_invalid_values")
_HARMLESS_IN_VLLM = ("detokenize", "skip_special_tokens", "spaces_between_special_tokens")
_LENGTHS = {"max_new_tokens": False, "max_tokens": True}  # whether in vLLM
_ROUNDED_CACHE = "quantized"


def set_all_tokens(args: Any) -> None:
    """Write a `top_k` that keeps all tokens as 0: `generate` reads None as transformers' default, 50."""
    if args.top_k in NEUTRAL["top_k"]:
        args.top_k = 0
    given = args.generation_kwargs or {}
    if "top_k" in given and given["top_k"] in NEUTRAL["top_k"]:
        args.generation_kwargs = given | {"top_k": 0}


def validate_sampling_is_scored(args: LogitMixGRPOConfig) -> None:
    """Raise `ValueError` for an option that samples rollouts from another distribution than the one that is scored."""
    if args.temperature is None or args.temperature <= 0:
        raise ValueError(
            f"temperature is {args.temperature}; it must be above 0, since rollouts of a group have to differ"
        )
    for name, neutral in NEUTRAL.items():
        value = getattr(args, name)
        if value in neutral:
            continue
        if name not in TRUNCATING:
            raise _moved(name, value, f"leave {name} at {neutral[0]!r}")
        if not args.score_truncated:
            raise _moved(name, value, f"leave {name} at {neutral[0]!r}, or set score_truncated")
        _validate_truncation(name, value)
    if args.cache_implementation == _ROUNDED_CACHE:
        raise _moved("cache_implementation", _ROUNDED_CACHE, "use another cache")
    _validate_generation_kwargs(args, args.generation_kwargs or {})


def truncates(args: LogitMixGRPOConfig) -> bool:
    """Whether sampling keeps only some tokens."""
    return any(getattr(args, name) not in NEUTRAL[name] for name in TRUNCATING)


def validate_score_truncated(args: LogitMixGRPOConfig, is_mixture: bool, given: Mapping[str, Any]) -> None:
    """Raise `ValueError` where `score_truncated` is set and the kept tokens of a rollout would not be known.

    `given` are the trainer's other arguments.
    """
    if not args.score_truncated:
        return
    obstacles = {
        "the model has no anchor, and TRL scores the whole distribution; set anchor": not is_mixture,
        "use_vllm is set, and vLLM does not tell which tokens it kept; sample without use_vllm": args.use_vllm,
        "decoding is 'alternating', which does not record the kept tokens; use 'auto' or 'joint'": (
            args.decoding == "alternating"
        ),
        "dynamic_sampling is 'refill', which cannot exchange the kept tokens of rollouts; use 'filter'": (
            args.dynamic_sampling == "refill"
        ),
    }
    for name in ("tools", "environment_factory", "rollout_func"):
        obstacle = f"{name} is given, and a rollout of several turns does not record its kept tokens; train without"
        obstacles[obstacle] = bool(given.get(name))
    for obstacle, is_met in obstacles.items():
        if is_met:
            raise ValueError(f"score_truncated is set, but {obstacle}, or leave out score_truncated")


def _validate_truncation(name: str, value: Any) -> None:
    if name == "top_k" and value < 2:
        raise ValueError(f"top_k is {value}; it must be at least 2, since rollouts of a group have to differ, or 0")
    if name != "top_k" and not 0 < value < 1:
        raise ValueError(f"{name} is {value}; it must be between 0 and 1")


def _validate_generation_kwargs(args: LogitMixGRPOConfig, given: Mapping[str, Any]) -> None:
    in_vllm = args.use_vllm
    neutral = _NEUTRAL_IN_VLLM if in_vllm else _NEUTRAL_IN_GENERATE
    free = (*ENDS_IN_VLLM, *_HARMLESS_IN_VLLM) if in_vllm else (*ENDS, *_HARMLESS)
    for key, value in given.items():
        name = f"generation_kwargs[{key!r}]"
        if key == "temperature":
            if value != args.temperature:
                raise _moved(name, value, f"set temperature, which is {args.temperature}, and is scored too")
        elif key in TRUNCATING and truncates(args):
            if value != getattr(args, key):
                raise _moved(name, value, f"leave it out, and set {key}, which is {getattr(args, key)}")
        elif _LENGTHS.get(key) == in_vllm:
            if value > args.max_completion_length:
                raise ValueError(
                    f"{name} is {value}, above max_completion_length {args.max_completion_length}, which prompts are "
                    "checked with; raise max_completion_length instead"
                )
        elif key == "cache_implementation" and not in_vllm:
            if value == _ROUNDED_CACHE:
                raise _moved(name, value, "use another cache")
        elif key in neutral:
            if value not in neutral[key]:
                raise _moved(name, value, "leave it out")
        elif key in ("eos_token_id", "stop_strings", "stop"):
            if key not in free:
                raise ValueError(f"{name} is {value!r}, which rollouts do not read; set stop_strings instead")
        elif key not in free:
            engine = "vLLM" if in_vllm else "generate"
            raise ValueError(
                f"{name} is {value!r}; rollouts by {engine} may set only {', '.join(sorted(free))} there, since other "
                "settings have no effect or sample from another distribution than the one that is scored; leave it out"
            )


def validate_suppressed_tokens(args: LogitMixGRPOConfig, eos_token_ids: Collection[int]) -> None:
    """Raise `ValueError` where `generation_kwargs` suppresses tokens that do not end a rollout."""
    given = (args.generation_kwargs or {}).get("suppress_tokens") or []
    tokens = [given] if isinstance(given, int) else given
    others = [token for token in tokens if token not in eos_token_ids]
    if others:
        raise _moved(
            "generation_kwargs['suppress_tokens']", others, f"only ends may be left out: {list(eos_token_ids)}"
        )


def _moved(name: str, value: Any, way_out: str) -> ValueError:
    return ValueError(
        f"{name} is {value!r}, which samples rollouts from another distribution than the one that is scored; {way_out}"
    )
