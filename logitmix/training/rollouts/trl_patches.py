"""What rollouts in vLLM replace in TRL, and the private names of TRL they read.

Written against TRL 1.16; tests/training/test_trl_patches.py is the contract.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import grpo_trainer


class PatchedVLLMGeneration(VLLMGeneration):
    """TRL's `VLLMGeneration` with a public name for the weights that it pushes into vLLM."""

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights to push, by their names in vLLM's model; TRL's are all of the model's."""
        yield from super()._iter_named_params()

    def _iter_named_params(self) -> Iterator[tuple[str, Tensor]]:
        return self.named_weights()

    def detached_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights to push, without gradients, as TRL's own pushes take them."""
        return ((name, parameter.detach()) for name, parameter in self._iter_named_params())

    @property
    def weights_are_discarded(self) -> bool:
        """Whether vLLM sleeps at level 2, without its weights, so that all of them have to be pushed again."""
        return self.mode == "colocate" and self._llm_weights_sleeping


@contextmanager
def generation_class(replacement: type[VLLMGeneration]) -> Iterator[None]:
    """Make TRL's trainer build `replacement` within the context; it has no argument for the class."""
    original, grpo_trainer.VLLMGeneration = grpo_trainer.VLLMGeneration, replacement
    try:
        yield
    finally:
        grpo_trainer.VLLMGeneration = original
