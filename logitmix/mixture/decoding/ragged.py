"""The logits processors and stopping criteria of `generate`, for sequences that have grown to different lengths.

Shape legend: B sequences, L slots for tokens, V vocabulary.

`generate` gives them a rectangle of tokens, in which every sequence has the same length. Here a sequence's tokens are
the first `length_B` of its row of `tokens_BL`; the rest of the row has no meaning.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import logits_process as processors
from transformers.generation import stopping_criteria as criteria

# They read no tokens, so that sequences of all lengths can be processed at once.
_WARPERS = (
    processors.TemperatureLogitsWarper,
    processors.TopKLogitsWarper,
    processors.TopPLogitsWarper,
    processors.TopHLogitsWarper,
    processors.MinPLogitsWarper,
    processors.TypicalLogitsWarper,
    processors.EpsilonLogitsWarper,
    processors.EtaLogitsWarper,
    processors.SuppressTokensLogitsProcessor,
    processors.InfNanRemoveLogitsProcessor,
    processors.LogitNormalization,
)
# They read a sequence's own tokens, and keep no state between calls.
_ROW_PROCESSORS = (
    processors.MinLengthLogitsProcessor,
    processors.MinNewTokensLengthLogitsProcessor,
    processors.RepetitionPenaltyLogitsProcessor,
    processors.NoRepeatNGramLogitsProcessor,
    processors.SequenceBiasLogitsProcessor,
    processors.NoBadWordsLogitsProcessor,
    processors.ForcedBOSTokenLogitsProcessor,
    processors.ForcedEOSTokenLogitsProcessor,
    processors.SuppressTokensAtBeginLogitsProcessor,
)
_CRITERIA = (
    criteria.MaxLengthCriteria,
    criteria.MaxTimeCriteria,
    criteria.StopStringCriteria,
    criteria.EosTokenCriteria,
)


def unsupported_processor(processors_and_criteria: Sequence[Any]) -> str | None:
    """The class of the first processor or criterion that is not known to work on each sequence by itself."""
    known = {*_WARPERS, *_ROW_PROCESSORS, *_CRITERIA}
    unknown = [type(each).__name__ for each in processors_and_criteria if type(each) not in known]
    return unknown[0] if unknown else None


def process_logits(
    logits_processor: LogitsProcessorList, logits_BV: Tensor, tokens_BL: Tensor, length_B: Tensor
) -> Tensor:
    """The processed logits `[B, V]` of each sequence's next token, in float32 as in `generate`."""
    logits_BV = logits_BV.float()
    if all(isinstance(each, _WARPERS) for each in logits_processor):
        processed_BV: Tensor = logits_processor(tokens_BL, logits_BV)
        return processed_BV
    processed_BV = torch.empty_like(logits_BV)
    for length in sorted(set(length_B.tolist())):
        rows = (length_B == length).nonzero().squeeze(1)
        processed_BV[rows] = logits_processor(tokens_BL[rows, :length], logits_BV[rows])
    return processed_BV


def has_ended(stopping_criteria: StoppingCriteriaList, tokens_BL: Tensor, length_B: Tensor) -> Tensor:
    """Whether each sequence ends with its last token, `[B]`."""
    ended_B = torch.zeros_like(length_B, dtype=torch.bool)
    for criterion in stopping_criteria:
        if isinstance(criterion, criteria.MaxLengthCriteria):
            ended_B |= length_B >= criterion.max_length
        else:
            width = criterion.maximum_token_len if isinstance(criterion, criteria.StopStringCriteria) else 1
            ended_B |= criterion(_last_tokens(tokens_BL, length_B, width), None).to(ended_B.device)
    return ended_B


def _last_tokens(tokens_BL: Tensor, length_B: Tensor, width: int) -> Tensor:
    """The last `width` tokens of each sequence; one that is shorter repeats its first on the left, as padding."""
    slots_BW = length_B[:, None] + torch.arange(-width, 0, device=length_B.device)
    return tokens_BL.gather(1, slots_BW.clamp(min=0))
