"""Each request's weights on vLLM's second model runner, which passes a model its requests' state.

Shape legend: N tokens, D width of a member's hidden states, K members, V vocabulary.

`model_state.py` keeps the weights of each request on the device, and passes `forward` those of each token. vLLM
selects rows of the result of `forward` for `compute_logits`. So each row holds its own weights, bit for bit, and
nothing is read on the host.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor

from logitmix.mixture.configuration import LogitMixConfig
from logitmix.mixture.mixing import Plausibility
from logitmix.serving.engine import Engine, OfMixture
from logitmix.serving.requests import parse_request_weights

ALIGNMENT = 16  # bytes: rows of the hidden states keep an alignment at which matrix products are fast


class RequestFields(LogitsProcessor, metaclass=OfMixture):
    """Rejects requests whose weights are invalid; leaves the logits unchanged."""

    config: LogitMixConfig | None = None

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        if cls.config is not None:
            parse_request_weights(cls.config, sampling_params.extra_args)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        return False  # vLLM then does not apply it

    def apply(self, logits: Tensor, ctx: LogitsContext) -> Tensor:
        return logits


class SecondRunnerEngine(Engine):
    """Hands the weights of each token's request to `compute_logits` beside its hidden states."""

    request_validator = RequestFields
    validates_beside_speculation = True

    def __init__(self, vllm_config: VllmConfig, widths: Sequence[int]) -> None:
        super().__init__(vllm_config, widths)
        # whether a running request may have a weight of 0 or below, which needs more care; set by `model_state.py`
        self.has_special_weights = False

    def join(self, hidden_ND: Sequence[Tensor], request_weights: Tensor | None) -> Tensor:
        if request_weights is None:
            raise RuntimeError(
                "this version of vLLM does not pass the mixture its requests' weights; set VLLM_USE_V2_MODEL_RUNNER=0"
            )
        return torch.cat([*hidden_ND, to_columns(request_weights, hidden_ND[0].dtype)], dim=-1)

    def split(self, hidden_states: Tensor) -> tuple[list[Tensor], Tensor]:
        *hidden_ND, columns = torch.split(
            hidden_states, [*self.widths, hidden_states.shape[-1] - sum(self.widths)], dim=-1
        )
        return hidden_ND, from_columns(columns, len(self.widths))

    def mix(self, logits_NV: Sequence[Tensor], weights: Tensor, scheme: str) -> Tensor:
        return mix_rows(logits_NV, weights, scheme, self.has_special_weights, self.cut)


def to_columns(weights_NK: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 weights as columns of another dtype, bit for bit, padded to `ALIGNMENT`."""
    padding = -weights_NK.shape[-1] % (ALIGNMENT // weights_NK.element_size())
    return torch.nn.functional.pad(weights_NK, (0, padding)).view(dtype)


def from_columns(columns: Tensor, num_members: int) -> Tensor:
    """The weights `[N, K]` in rows of `to_columns`' result."""
    return columns.contiguous().view(torch.float32)[:, :num_members]


def mix_rows(
    logits_NV: Sequence[Tensor],
    weights_NK: Tensor,
    scheme: str,
    has_special_weights: bool = True,
    cut: Plausibility | None = None,
) -> Tensor:
    """`mix_logits` of rows with weights on the device, without reading them on the host, which would wait for it.

    `has_special_weights` may be False if all weights are above 0: then infinite logits need no care.
    """
    terms = []
    for z_NV, weight_N1 in zip(logits_NV, torch.split(weights_NK, 1, dim=-1), strict=True):
        z_NV = z_NV.float()
        term_NV = torch.log_softmax(z_NV, dim=-1) + weight_N1.log() if scheme == "prob" else z_NV * weight_N1
        if has_special_weights:  # a member of weight 0 is ignored, whatever its logits
            term_NV = term_NV.masked_fill_(weight_N1 == 0, -torch.inf if scheme == "prob" else 0.0)
        terms.append(term_NV)
    mixed_NV = terms[0]
    for term_NV in terms[1:]:
        mixed_NV = torch.logaddexp(mixed_NV, term_NV) if scheme == "prob" else mixed_NV + term_NV
    if has_special_weights and scheme == "logit":  # beside -inf, a negative weight can make +inf, and their sum is NaN
        for term_NV in terms:
            mixed_NV = mixed_NV.masked_fill_(term_NV.isneginf(), -torch.inf)
    if cut is not None:
        ruled_out_NV = cut.ruled_out(logits_NV[cut.member]) & cut.applies(weights_NK)[:, None]
        mixed_NV = mixed_NV.masked_fill_(ruled_out_NV, -torch.inf)
    return mixed_NV
