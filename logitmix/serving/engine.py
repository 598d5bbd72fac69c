"""What a mixture needs of vLLM's model runner, of which vLLM has two.

Shape legend: N tokens, D width of a member's hidden states, K members, V vocabulary.

vLLM passes hidden states from `forward` to `compute_logits`, and selects the rows in between. The mixture also needs
the weights of each row's request there. `Engine` is that interface; `engine_v1.py` and `engine_v2.py` implement it.
"""

import copyreg
from abc import ABC, ABCMeta, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor
from vllm.config import VllmConfig

from logitmix.mixture.configuration import LogitMixConfig


class OfMixture(ABCMeta):
    """The metaclass of logits processors that validate the requests to one mixture.

    vLLM calls `validate_params` on the class, in the server's process. `processor.of(config)` is a subclass with the
    mixture's `config`, so a process can serve several mixtures. It is pickled as its base and its configuration.
    """

    config: LogitMixConfig | None

    def of(cls, config: LogitMixConfig) -> "OfMixture":
        return OfMixture(cls.__name__, (cls,), {"config": config, "__module__": cls.__module__})


def _reduce(cls: OfMixture) -> Any:
    return cls.__qualname__ if cls.config is None else (OfMixture.of, (cls.__base__, cls.config))


copyreg.pickle(OfMixture, _reduce)  # type: ignore[arg-type]  # a class reduces to its name, too


class Engine(ABC):
    """Carries the weights of each token's request from vLLM's model runner to `compute_logits`.

    `widths` are the widths D of the members' hidden states.
    """

    # a logits processor by which vLLM validates requests, and whether vLLM accepts one beside speculative decoding
    request_validator: ClassVar[OfMixture]
    validates_beside_speculation: ClassVar[bool]

    def __init__(self, vllm_config: VllmConfig, widths: Sequence[int]) -> None:
        self.config: LogitMixConfig = vllm_config.model_config.hf_config
        self.cut = self.config.cut
        self.widths = list(widths)

    @abstractmethod
    def join(self, hidden_ND: Sequence[Tensor], request_weights: Tensor | None) -> Tensor:
        """One tensor `[N, sum of D + columns]` of the members' hidden states and what `split` needs beside them.

        `request_weights` `[N, K]` are those of each token's request, if the runner passes them to the model.
        """

    @abstractmethod
    def split(self, hidden_states: Tensor) -> tuple[list[Tensor], Tensor]:
        """The members' hidden states in rows of `join`'s result, and the rows' weights `[N, K]`, or `[K]` for all."""

    @abstractmethod
    def mix(self, logits_NV: Sequence[Tensor], weights: Tensor, scheme: str) -> Tensor:
        """`mix_logits` `[N, V]` at the weights that `split` returned, with the mixture's plausibility cut, if any."""
