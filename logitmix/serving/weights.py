"""The weights of each request of a running batch.

A request asks for its own mixture with `SamplingParams(extra_args={"alpha": 0.3})`, or `"weights"`, or
`"member": "policy"`. vLLM tells its logits processors which request stands in which row of the batch, and nothing
else of ours: so the requests' weights are kept by one, which leaves the logits as they are, and read by the model.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from logitmix.configuration import LogitMixConfig, resolve_weights

KEYS = ("alpha", "weights", "member")


def request_weights(config: LogitMixConfig, extra_args: dict[str, Any] | None) -> list[float] | None:
    """The weights that a request asks for, None where it takes the mixture's own.

    Raises `ValueError` for two of the keys at once, an unknown member, or weights outside the scheme's domain or the
    configuration's `alpha_range`.
    """
    given = {key: extra_args[key] for key in KEYS if extra_args and extra_args.get(key) is not None}
    if not given:
        return None
    if len(given) > 1:
        raise ValueError(f"pass one of {', '.join(given)}, not {len(given)}")
    if "member" in given:
        member = config.member_named(given["member"])
        return [float(name == member) for name in config.members]
    ((key, value),) = given.items()
    if isinstance(value, (bool, str)) or (key == "weights") != isinstance(value, list):
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


class RequestWeights(LogitsProcessor):
    """Keeps the weights of the requests of the batch; the logits pass unchanged."""

    # of the mixture that this process serves: vLLM validates requests on the class
    served: ClassVar[LogitMixConfig | None] = None
    # by the configuration's instance: the model looks up its own
    instances: ClassVar[dict[str, "RequestWeights"]] = {}

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.config = vllm_config.model_config.hf_config
        self.own: dict[int, list[float]] = {}
        self.sampling = False  # whether the next logits asked for are those that are sampled from
        self.instances[vllm_config.instance_id] = self

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        if cls.served is not None:
            request_weights(cls.served, sampling_params.extra_args)

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(
            self.own, batch_update, lambda params, _, __: request_weights(self.config, params.extra_args)
        )
        self.sampling = True

    def apply(self, logits: Tensor) -> Tensor:
        return logits

    def of_rows(self, rows: range | list[int]) -> Tensor:
        """Weights `[K]`, or `[N, K]` of the requests in these rows where one has its own."""
        default = self.config.weights
        if not any(row in self.own for row in rows):
            return torch.tensor(default)
        return torch.tensor([self.own.get(row, default) for row in rows])
