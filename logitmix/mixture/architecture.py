"""Which architectures can be members: checked by what a model does, not by its name.

docs/architectures.md lists the outcome for every causal architecture of transformers; a test keeps it.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from logitmix.mixture.cache import member_caches
from logitmix.mixture.head import gathered_parameters
from logitmix.mixture.opening import first_line
from logitmix.mixture.padding import position_ids_from_mask

_SUPPORTED = "docs/architectures.md lists the architectures that can be members"
_PROBE = ((1, 2, 3), (1, 2, 4))  # they differ in the last token only
_TOLERANCE = 0.05  # of the standard deviation of the logits: above rounding, below what another token changes


def validate_architecture(member: PreTrainedModel) -> None:
    """Raise `ValueError` for a model that a mixture could not load, sample in padded batches, or cache.

    Runs a few tokens through the member, unless its weights are on the meta device, and changes nothing in it.
    """
    _validate_class(member)
    _validate_positions(member)
    if any(parameter.is_meta for parameter in member.parameters()):
        return
    with _evaluating(member):
        _validate_forward(member, _view(_new_cache(member)))


def _validate_class(member: PreTrainedModel) -> None:
    """A checkpoint of a mixture holds its members' configurations; loading it builds the models that these name."""
    expected = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(member.config), None)
    if expected is None or not isinstance(member, expected):
        built = f"builds a {expected.__name__}" if expected is not None else "builds nothing"
        raise _refusal(
            member,
            f"AutoModelForCausalLM {built} from its {type(member.config).__name__}, so a saved mixture could not be "
            "loaded; take the text model out of it, or use a causal language model",
        )


def _validate_positions(member: PreTrainedModel) -> None:
    """A table of positions must be read at the positions that the tokens have without the padding on their left."""
    if "position_ids" in inspect.signature(type(member).forward).parameters:
        return
    width = member.get_input_embeddings().embedding_dim  # of a table that is added to the tokens' embeddings
    for name, module in member.named_modules():
        is_table = isinstance(module, nn.Embedding) and module.embedding_dim == width
        if is_table and "position" in name.rpartition(".")[2]:
            raise _refusal(
                member,
                "its forward takes no position_ids, so it would count the padding on the left of a batch as tokens; "
                + _SUPPORTED,
            )


@torch.no_grad()
def _validate_forward(member: PreTrainedModel, cache: Cache) -> None:
    ids = torch.tensor(_PROBE, device=member.device)
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    with _errors_refuse(member):
        with gathered_parameters(member):
            logits_BTV = member(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                return_dict=True,
            ).logits
        num_cached = int(cache.get_seq_length())
    if num_cached != ids.shape[1]:
        raise _refusal(
            member,
            f"it keeps {num_cached} of {ids.shape[1]} tokens in the KV cache that members share; {_SUPPORTED}",
        )
    if _differ(logits_BTV[0, :-1], logits_BTV[1, :-1]):
        raise _refusal(
            member,
            "its logits at a token depend on later tokens, so it is no causal language model; for an encoder such as "
            "BERT load it with is_decoder=True in its configuration",
        )

    # only where rounding, which can also choose other experts, is far below the tolerance
    is_exact = member.dtype == torch.float32 and getattr(member.config, "quantization_config", None) is None
    if is_exact and _differ(logits_BTV[0, -1], _padded_logits(member, ids[:1])[0, -1]):
        raise _refusal(
            member,
            f"with the KV cache and padding on the left its logits are not those of the tokens alone; {_SUPPORTED}",
        )


def _padded_logits(member: PreTrainedModel, ids: Tensor) -> Tensor:
    """The logits of the last token, decoded after the others of a sequence that is padded on the left."""
    padded, mask = nn.functional.pad(ids, (2, 0)), nn.functional.pad(torch.ones_like(ids), (2, 0))
    positions, cache, last = position_ids_from_mask(mask), _new_cache(member), padded.shape[1] - 1
    with _errors_refuse(member), gathered_parameters(member):
        for tokens in (slice(0, last), slice(last, None)):
            output = member(
                input_ids=padded[:, tokens],
                attention_mask=mask[:, : tokens.stop],
                position_ids=positions[:, tokens],
                past_key_values=_view(cache),
                use_cache=True,
                return_dict=True,
            )
    logits: Tensor = output.logits
    return logits


@contextmanager
def _evaluating(member: PreTrainedModel) -> Iterator[None]:
    """Without dropout, which adapters have in training mode beside a base in evaluation mode."""
    training = [module for module in member.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _errors_refuse(member: PreTrainedModel) -> Iterator[None]:
    """Turn whatever a forward pass raises, except for a lack of memory, into a refusal."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, RuntimeError, AttributeError, LookupError) as error:
        raise _refusal(
            member, f"it cannot run with the KV cache that members share ({first_line(error)}); {_SUPPORTED}"
        ) from error


def _new_cache(member: PreTrainedModel) -> Cache:
    return DynamicCache(config=member.config.get_text_config(decoder=True))


def _view(cache: Cache) -> Cache:
    """A member's view of the cache, which is another object in each step: what is not in its layers is lost."""
    view = member_caches(cache, [len(cache.layers)])[0]
    assert view is not None
    return view


def _differ(logits: Tensor, others: Tensor) -> bool:
    return bool((logits.float() - others.float()).abs().max() > _TOLERANCE * logits.float().std())


def _refusal(member: PreTrainedModel, reason: str) -> ValueError:
    return ValueError(f"{_name(member)} cannot be a member of a mixture: {reason}")


def _name(member: PreTrainedModel) -> str:
    """`the GPT2LMHeadModel 'gpt2'`, or without the folder or hub id of a model made in memory."""
    return f"the {type(member).__name__}" + (f" {member.name_or_path!r}" if member.name_or_path else "")
