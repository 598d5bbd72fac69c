"""How `generate` draws the tokens of a mixture: jointly, alternating, or by a rule that chooses at every step.

Joint decoding runs all members for each token. Alternating decoding (`alternating.py`) draws from the same
distribution in fewer passes, which are longer.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerateDecoderOnlyOutput

from logitmix.mixture.base import MixtureBase
from logitmix.mixture.decoding.alternating import AlternatingDecoder, DecodingStatistics
from logitmix.mixture.decoding.ends import CompletionEnds
from logitmix.mixture.decoding.pass_costs import PassCosts
from logitmix.mixture.decoding.ragged import unsupported_processor
from logitmix.mixture.decoding.rewinding import unsupported_cache
from logitmix.mixture.decoding.sequences import OpenSequences
from logitmix.mixture.decoding.speculation import SpeculativeSampler
from logitmix.mixture.mixing import validate_weights
from logitmix.mixture.padding import position_ids_from_mask
from logitmix.mixture.sharding import are_sharded
from logitmix.mixture.torch_patches import fast_products_of_few_rows

Decoding = Literal["auto", "joint", "alternating"]

# The acceptance rate that is expected before drafts have been verified, and how many drafts it weighs as much as
_EXPECTED_ACCEPTANCE, _EXPECTED_DRAFTS = 0.8, 20
# of the forward; and the tokenizer, which `generate` needs for stop strings
_READ_ARGUMENTS = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "weights"}
_READ_ARGUMENTS |= {"tokenizer"}


@dataclass
class MixtureGenerateOutput(GenerateDecoderOnlyOutput):
    """What `generate(return_dict_in_generate=True)` returns unless all of it was left to transformers.

    Args:
        sequences: prompts and completions, as of `generate`.
        lengths: the number of new tokens of each sequence, `[B]`; padding follows them.
        member_logprobs: each member's log-probability of each new token, of its own distribution at temperature 1,
            untruncated, `[B, T, K]`; 0 after the end of a sequence. None unless `output_member_logprobs`.
        statistics: how many passes and drafts it took.
    """

    lengths: Tensor | None = None
    member_logprobs: Tensor | None = None
    statistics: DecodingStatistics | None = None


@dataclass
class DecodingRequest:
    """The arguments of a call of `generate` that transformers does not know, and whether they took effect."""

    decoding: Decoding = "joint"
    output_member_logprobs: bool = False
    has_member_prompts: bool = False
    took_effect: bool = False

    def __post_init__(self) -> None:
        if self.decoding not in get_args(Decoding):
            names = ", ".join(map(repr, get_args(Decoding)))
            raise ValueError(f"decoding is {self.decoding!r}; it must be one of {names}")

    @property
    def is_for_transformers(self) -> bool:
        """Whether `generate` of transformers does what is requested."""
        return self.decoding == "joint" and not self.output_member_logprobs

    def refuse(self, reason: str) -> None:
        """Raise `ValueError` if the request cannot be left to transformers, because of `reason`."""
        if self.output_member_logprobs:
            raise ValueError(f"output_member_logprobs cannot be used with {reason}; leave one of them out")
        if self.decoding == "alternating":
            raise ValueError(f"alternating decoding cannot be used with {reason}; use decoding='joint' or 'auto'")


def validate_decoding(model: PreTrainedModel, decoding: Decoding) -> None:
    """Raise `ValueError` for a decoding that does not exist, or that the model does not have."""
    request = DecodingRequest(decoding)
    if isinstance(model, MixtureBase):
        reason = None if request.is_for_transformers else _reason_against_model(model, decoding)
    else:
        reason = f"a {type(model).__name__}, which is no mixture"
    if reason is not None:
        request.refuse(reason)


_request: ContextVar[DecodingRequest] = ContextVar("decoding_request", default=DecodingRequest())  # noqa: B039


@contextmanager
def requested_decoding(request: DecodingRequest) -> Iterator[None]:
    """Let calls of `generate` within the context decode as requested."""
    token = _request.set(request)
    try:
        yield
    finally:
        _request.reset(token)
    if not request.took_effect and not request.is_for_transformers:
        request.refuse("these arguments")


def current_request() -> DecodingRequest:
    """The request of the call of `generate` that is running."""
    return _request.get()


def decode(
    model: MixtureBase,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Tensor | MixtureGenerateOutput | None:
    """Decode as requested; the arguments are those of the loop that `generate` calls with everything prepared.

    Returns None where that is left to transformers. Raises `ValueError` for a request that cannot be met.
    """
    request = current_request()
    request.took_effect = True
    if request.is_for_transformers:
        return None
    K = len(model.config.members)
    weights_BK = validate_weights(model_kwargs.get("weights", model.config.weights), K, model.config.scheme)
    weights_BK = weights_BK.expand(len(input_ids), K)
    ends = next((each for each in stopping_criteria if isinstance(each, CompletionEnds)), None)
    if ends is not None:
        stopping_criteria = StoppingCriteriaList([each for each in stopping_criteria if each is not ends])
        stopping_criteria += [ends.stop] if ends.stop is not None else []
    reason = _reason_against(
        model, request, input_ids, (*logits_processor, *stopping_criteria), generation_config, weights_BK,
        synced_gpus, streamer, model_kwargs,
    )  # fmt: skip
    if reason is not None:
        request.refuse(reason)
        return None
    if request.output_member_logprobs and not generation_config.return_dict_in_generate:
        raise ValueError("output_member_logprobs is set, but return_dict_in_generate is not; set both, or neither")
    mask_BP = model_kwargs.get("attention_mask")
    sequences = OpenSequences(
        input_ids,
        torch.ones_like(input_ids) if mask_BP is None else mask_BP,
        weights_BK,
        generation_config.max_length,
        _pad_token_id(generation_config),
        request.output_member_logprobs,
        streamer,
    )
    sampler = SpeculativeSampler(logits_processor, is_greedy=not generation_config.do_sample)
    decoder = AlternatingDecoder(model, sequences, sampler, stopping_criteria, ends.report if ends else None)
    costs = None if request.decoding == "joint" else PassCosts.of(model)
    with fast_products_of_few_rows(model):
        while len(sequences):
            decoder.step(None if costs is None else _choose_num_drafts(costs, request, decoder))
    if streamer is not None:
        streamer.end()
    return _output(sequences, decoder.statistics, generation_config)


def _choose_num_drafts(
    costs: PassCosts, request: DecodingRequest, decoder: AlternatingDecoder
) -> tuple[int, int] | None:
    accepted, drafted = sum(decoder.statistics.accepted), sum(decoder.statistics.drafted)
    acceptance = (accepted + _EXPECTED_ACCEPTANCE * _EXPECTED_DRAFTS) / (drafted + _EXPECTED_DRAFTS)
    return costs.choose_num_drafts(len(decoder.sequences), acceptance, may_be_joint=request.decoding == "auto")


def _reason_against(
    model: MixtureBase,
    request: DecodingRequest,
    input_ids: Tensor,
    processors: Sequence[Any],
    config: GenerationConfig,
    weights_BK: Tensor,
    synced_gpus: bool,
    streamer: Any,
    arguments: dict[str, Any],
) -> str | None:
    """What the decoding of this module cannot be used with, if anything."""
    reason = _reason_against_model(model, request.decoding)
    if reason is not None:
        return reason
    if request.decoding == "auto" and (weights_BK == 0).all(0).any():
        return "a member of weight 0, which joint decoding does not run"
    unknown = sorted(k for k in set(arguments) - _READ_ARGUMENTS if arguments[k] is not None)
    if unknown:
        return f"the argument {unknown[0]!r}"
    cache: Any = arguments.get("past_key_values")
    if type(cache) is not DynamicCache or not arguments.get("use_cache"):
        return f"a cache of the class {type(cache).__name__}: it takes the default one"
    if cache.get_seq_length() > 0:
        return "a cache that holds tokens"
    mask_BP, positions_BP = arguments.get("attention_mask"), arguments.get("position_ids")
    expected_BP = position_ids_from_mask(torch.ones_like(input_ids) if mask_BP is None else mask_BP)
    if positions_BP is not None and not torch.equal(positions_BP.expand_as(expected_BP), expected_BP):
        return "position_ids of one's own"
    outputs = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
    requested = [name for name in outputs if getattr(config, name)]
    if requested:
        return f"{requested[0]}=True"
    if streamer is not None and len(input_ids) > 1:
        return "a streamer of several sequences"
    if synced_gpus or are_sharded((model, *model.members)):
        return "weights that are sharded over processes, which must take their passes together"
    unsupported = unsupported_processor(processors)
    if unsupported is not None:
        return f"a {unsupported}, which may not work on each sequence by itself"
    return None


def _reason_against_model(model: MixtureBase, decoding: Decoding) -> str | None:
    if decoding != "joint":
        if len(model.config.members) != 2:
            return f"{len(model.config.members)} members: it takes 2"
        if len(model.config.model_names) != 2:
            return "members that share one model through adapters, whose passes read the same weights"
    return unsupported_cache(model)


def _output(
    sequences: OpenSequences, statistics: DecodingStatistics, config: GenerationConfig
) -> Tensor | MixtureGenerateOutput:
    finished, P = sequences.finished, sequences.prompt_BP.shape[1]
    L = int(finished.length_B.max())
    tokens_BL, logprobs = finished.tokens_BL[:, :L], finished.member_logprobs_BTK
    if not config.return_dict_in_generate:
        return tokens_BL
    return MixtureGenerateOutput(
        sequences=tokens_BL,
        lengths=finished.length_B - P,
        member_logprobs=None if logprobs is None else logprobs[:, : L - P],
        statistics=statistics,
    )


def _pad_token_id(config: GenerationConfig) -> int:
    """As of `generate`: EOS if there is no padding token."""
    if config.pad_token_id is not None:
        return int(config.pad_token_id)
    eos = config.eos_token_id
    return 0 if eos is None else int(eos[0] if isinstance(eos, (list, tuple)) else eos)
