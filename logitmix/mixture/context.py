"""The context that the members of a mixture share, and the check that a prompt and its completion fit it."""

from transformers import PreTrainedConfig


def context_length(config: PreTrainedConfig) -> int | None:
    """The most tokens of prompt and completion that a model takes, of a mixture the shortest of its members'.

    None where the configuration states no limit.
    """
    length: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length


def longest_prompt(config: PreTrainedConfig, num_prompt_tokens: int, prompt: str = "the prompt") -> tuple[int, str]:
    """The tokens of the longest prompt that a member reads, and its name: `prompt`, or that of a saved one."""
    own = {name: len(ids) for name, ids in getattr(config, "member_prompts", {}).items()}
    name = max(own, key=own.__getitem__, default=None)
    if name is None or own[name] <= num_prompt_tokens:
        return num_prompt_tokens, prompt
    return own[name], f"the prompt of {name}"


def validate_fits_context(
    context: int | None,
    num_prompt_tokens: int,
    max_new_tokens: int,
    prompt: str = "the prompt",
    option: str = "max_new_tokens",
    of: str = "the members'",
) -> None:
    """Raise `ValueError` if a prompt and `max_new_tokens` more tokens exceed `context`, unless that is None.

    The message names the prompt by `prompt`, the limit on new tokens by `option`, and whose context it is by `of`.
    """
    if context is None or num_prompt_tokens + max_new_tokens <= context:
        return
    if num_prompt_tokens >= context:
        raise ValueError(
            f"{prompt} has {num_prompt_tokens} tokens, which leaves no room for a completion in {of} context "
            f"of {context}; shorten or drop the prompt"
        )
    raise ValueError(
        f"{prompt} has {num_prompt_tokens} tokens; with {option} {max_new_tokens} that exceeds {of} context "
        f"of {context}; shorten or drop the prompt, or lower {option}"
    )
