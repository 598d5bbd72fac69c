"""Checks of a tokenizer against what it is used for: to open a completion, to render chats, to keep a template's tags.

A tokenizer that fails one of them gives prompts or responses that are wrong in silence.
"""

import re
import string
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from jinja2 import TemplateError
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from logitmix.mixture.transformers_patches import make_tokens_ordinary
from logitmix.tasks import Problem, Task, Template

PROBE = "A question."
ROUND_TRIPS = 8  # problems, of which one whose format survives is enough


def leave_texts_open(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Stop the tokenizer from appending tokens to texts: after EOS, a model does not continue its prompt.

    Tokenizers with `add_eos_token`, and those of encoders, append some. What they prepend is kept. Returns the
    tokenizer. Raises `ValueError` for one that cannot be changed.
    """
    before, after = _added_tokens(tokenizer)
    if not after:
        return tokenizer
    tokens = tokenizer.convert_ids_to_tokens(after)
    if getattr(tokenizer, "add_eos_token", False):
        tokenizer.add_eos_token = False
    if tokenizer.is_fast:
        prefix = dict(zip(tokenizer.convert_ids_to_tokens(before), before, strict=True))
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=[*prefix, "$A"], pair=[*prefix, "$A", "$B:1"], special_tokens=list(prefix.items())
        )
    if _added_tokens(tokenizer) != (before, []):
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path!r} appends {' '.join(tokens)} to every prompt, which a model "
            "does not continue; set add_eos_token to false in its tokenizer_config.json, or use its fast version"
        )
    warnings.warn(
        f"the tokenizer of {tokenizer.name_or_path!r} appends {' '.join(tokens)} to every text, which would end "
        "prompts; it is used without",
        stacklevel=2,
    )
    return tokenizer


def tokenize_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The ids of texts, which may be rendered chats: BOS is not prepended to a text that begins with it."""
    rows = leave_texts_open(tokenizer)(list(texts))["input_ids"]
    bos, twice = tokenizer.bos_token, [tokenizer.bos_token_id] * 2
    return [
        ids[1:] if bos and text.startswith(bos) and ids[:2] == twice else ids
        for text, ids in zip(texts, rows, strict=True)
    ]


def validate_texts_open(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` if the tokenizer appends tokens to texts: for programs that load it themselves."""
    _, after = _added_tokens(tokenizer)
    if after:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path!r} appends {' '.join(tokenizer.convert_ids_to_tokens(after))} "
            "to every prompt, which a model does not continue; load it with logitmix.mixture.loading.load_tokenizer, "
            "which removes that, and save it in the folder"
        )


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens before and after the ids of a text."""
    text = "a1"
    plain, whole = tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer(text)["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if plain and whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    # the vocabulary has no such text
    return (whole[:-1], whole[-1:]) if whole and whole[-1] == tokenizer.eos_token_id else (whole, [])


def validate_chat_template(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any] | None = None) -> None:
    """Raise `ValueError` if the tokenizer has no chat template, or one that leaves out a user's text.

    `kwargs` are the `chat_template_kwargs`, of which the template must read each: Jinja ignores the others in silence.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the prompts are chats, but the tokenizer of {tokenizer.name_or_path!r} has no chat template; use a "
            "tokenizer that has one, or a text --template such as r1"
        )
    for name in kwargs or {}:
        if not re.search(rf"\b{re.escape(name)}\b", tokenizer.get_chat_template()):
            raise ValueError(
                f"chat_template_kwargs has {name!r}, which the chat template of {tokenizer.name_or_path!r} does not "
                "read; correct the name, or leave it out"
            )
    validate_renders_texts(tokenizer)


def validate_no_chat_template_kwargs(kwargs: Mapping[str, Any]) -> None:
    """Raise `ValueError` for `chat_template_kwargs` beside prompts that are texts."""
    if kwargs:
        raise ValueError(
            f"chat_template_kwargs is {dict(kwargs)}, but the prompts are texts, which no chat template renders; "
            "leave it out, or use a --template of chats such as boxed"
        )


def validate_renders_texts(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` if the chat template, where there is one, leaves out a user's text."""
    try:
        rendered = render_chat(tokenizer, [{"role": "user", "content": PROBE}], add_generation_prompt=True)
    except (TemplateError, TypeError, LookupError, ValueError):  # it may take other messages, such as a system's first
        return
    if PROBE not in rendered:
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} leaves out the text of a user's message, as those that "
            "need content parts do; use a chat template that takes texts, or prompts that are texts (--template r1)"
        )


@contextmanager
def chat_template_errors(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Within the context, an error inside the chat template is a `ValueError` of one sentence."""
    try:
        yield
    except (TemplateError, TypeError, LookupError) as error:
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} cannot render the messages "
            f"({' '.join(str(error).split())}); correct it or the messages, or use a text --template such as r1"
        ) from error


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], **kwargs: Any) -> str:
    """The text of the messages in the chat template."""
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **kwargs))


def end_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens with which a tokenizer ends a text or the assistant's turn: EOS, and the chat template's."""
    ends = (tokenizer.eos_token_id, get_end_of_turn_token_id(tokenizer))
    return [end for end in ends if end is not None]


def declared_ends(model: PreTrainedModel) -> list[int]:
    """The EOS tokens of the model's generation configuration."""
    declared = model.generation_config.eos_token_id if model.generation_config is not None else None
    return [] if declared is None else [declared] if isinstance(declared, int) else list(declared)


def get_end_of_turn_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token with which the chat template ends the assistant's turn, None if there is none.

    There is none either where the template fails, or leaves out the reply after which the token would be.
    """
    if tokenizer.chat_template is None:
        return None
    reply = "The reply."
    for wrap in (str, lambda text: [{"type": "text", "text": text}]):  # some templates need content parts
        chat = [{"role": "user", "content": wrap(PROBE)}, {"role": "assistant", "content": wrap(reply)}]
        try:
            rendered = render_chat(tokenizer, chat)
        except (TemplateError, TypeError, LookupError, ValueError):  # it matters only where chats are rendered
            continue
        _, found, closing = rendered.rpartition(reply)
        if found:
            return _first_special_token_id(tokenizer, closing)
    return None


def _first_special_token_id(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    """The token that the text starts with, if it is a special one that is written there: not the unknown token."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    token = tokenizer.added_tokens_decoder.get(ids[0]) if ids else None
    return ids[0] if token is not None and token.special and token.content in text else None


def prepare_for_task(tokenizer: PreTrainedTokenizerBase, task: Task, problems: Sequence[Problem]) -> None:
    """Make responses to a task decode as the model writes them.

    A demonstration must keep its format when it is encoded and decoded without special tokens. Tags of the template
    that are special tokens become ordinary ones, also where the tokenizer is saved. Warns of a vocabulary that lacks
    characters of the template, with which no response is right.

    Raises `ValueError` where tags that are tokens of their own lose the format in another way.
    """
    keep_tags(tokenizer, task.template)
    lost = None
    for problem in problems[:ROUND_TRIPS]:
        try:
            response = task.template.completion("", problem.answer)
            if problem.solution is not None:
                response = task.demonstration(problem)
        except ValueError:  # check-task reports it
            continue
        ids = tokenizer(response, add_special_tokens=False)["input_ids"]
        decoded = tokenizer.decode(ids, skip_special_tokens=True)
        if task.grade(decoded, problem).format_ok or not task.grade(response, problem).format_ok:
            return
        lost = lost or (response, decoded)
    if lost is not None:
        literals = _literals(task.template)
        tags = [repr(text) for text in literals if text not in lost[1]]
        reason = (
            f"the tokenizer of {tokenizer.name_or_path!r} does not keep {' and '.join(tags) or 'the format'} "
            f"of the template {task.template.name!r}: a perfect response is decoded as {lost[1][-80:]!r}, which is "
            "not format-correct; use another --template or tokenizer"
        )
        if any(token.content in "".join(literals) for token in tokenizer.added_tokens_decoder.values()):
            raise ValueError(reason)
        warnings.warn(reason, stacklevel=2)


def keep_tags(tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
    """Make the special tokens that the template requires in a response ordinary ones, which decoding keeps.

    Raises `ValueError` for a tokenizer that cannot be changed.
    """
    completion = template.completion("", "1")
    literal = "".join(_literals(template))
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    tags = sorted(tag for tag in special | set(tokenizer.all_special_tokens) if tag in literal)
    without = completion
    for tag in tags:
        without = without.replace(tag, "")
    if not tags or template.is_formatted(without):
        return
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tags {' and '.join(map(repr, tags))} of the template {template.name!r} are special tokens of the "
            f"tokenizer of {tokenizer.name_or_path!r}, which decoding drops; use its fast version, or another template"
        )
    make_tokens_ordinary(tokenizer, tags)


def _literals(template: Template) -> list[str]:
    """The texts that `completion_format` puts around solution and answer."""
    return [text for text, *_ in string.Formatter().parse(template.completion_format) if text.strip()]
