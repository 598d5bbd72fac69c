"""What rollouts replace in TRL, with `generate` or in vLLM, and the private names of TRL they read.

Written against TRL 1.16; tests/training/test_trl_patches.py is the contract.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from trl import GRPOTrainer
from trl.data_utils import is_conversational
from trl.generation import vllm_generation
from trl.generation.vllm_generation import VLLMGeneration
from trl.models import unwrap_model_for_generation
from trl.trainer import grpo_trainer

from logitmix.mixture.tokenizers import chat_template_errors, validate_chat_template, validate_no_chat_template_kwargs
from logitmix.training.fsdp import gathered_weights
from logitmix.training.transformers_patches import generate_without_fsdp_hooks


class GatheredGeneration:
    """A mixin of TRL's trainers: a model to generate with, and vLLM's weights that are up to date."""

    args: Any
    accelerator: Any
    model_wrapped: Any
    state: Any
    vllm_generation: Any
    _dist: Any
    _last_loaded_step: int  # the step whose weights vLLM has

    def sync_stale_vllm_weights(self) -> None:
        """Push the weights into vLLM where an update came after the last push."""
        if self.state.global_step != self._last_loaded_step:
            self.vllm_generation.sync_weights()
            self._last_loaded_step = self.state.global_step

    @contextmanager
    def generation_model(self) -> Iterator[PreTrainedModel]:
        """The model to generate with; sharded weights are gathered once, unless `ds3_gather_for_generation` is False.

        All processes enter together. Inside, each may generate as much as it likes; with the flag off every forward
        pass gathers, and all processes must take equally many.
        """
        gather = self.args.ds3_gather_for_generation
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=gather,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
            # accelerate's own is around the forward of the mixture, which alternating decoding passes by
            self.accelerator.autocast(),
        ):
            plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
            if plugin is None or not gather:
                yield model
                return
            with gathered_weights(model, plugin.reshard_after_forward), generate_without_fsdp_hooks(model):
                yield model


class PatchedRollouts(GatheredGeneration, GRPOTrainer):
    """TRL's `GRPOTrainer` with public names for how prompts become completions:

    | TRL 1.16 | here | |
    |---|---|---|
    | `_tokenize_prompts` | `check_prompts` | the prompts of an outer step, as token ids |
    | `_generate_single_turn` | `sample` | completions of prompts |
    """

    def check_prompts(self, prompt_ids: list[list[int]]) -> None:
        """Called with the prompts of an outer step before anything is sampled."""

    def sample(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> tuple[list[list[int]], Any]:
        """A completion of each prompt, as token ids, and the sampler's log-probabilities or None."""
        return super()._generate_single_turn(prompt_ids, *args, **kwargs)

    def tokenize_prompts(self, prompts: list) -> list[list[int]]:
        """The ids of each prompt, as rollouts use them."""
        prompt_ids: list[list[int]] = self._tokenized(prompts)[0]
        return prompt_ids

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> tuple[list[list[int]], Any]:
        return self.sample(prompt_ids, *args, **kwargs)

    def _tokenize_prompts(self, prompts: list) -> tuple:
        tokenized = self._tokenized(prompts)
        self.check_prompts(tokenized[0])
        return tokenized

    def _tokenized(self, prompts: list) -> tuple:
        """As TRL's, with one sentence for a chat template that fails, or leaves out the messages' texts."""
        is_chat = is_conversational({"prompt": prompts[0]})
        if not is_chat:
            validate_no_chat_template_kwargs(self.chat_template_kwargs)
        elif isinstance(prompts[0][0]["content"], str) and not self._is_vlm:
            validate_chat_template(self._tokenizer, self.chat_template_kwargs)
        with chat_template_errors(self._tokenizer):
            tokenized: tuple = super()._tokenize_prompts(prompts)
        return tokenized


class PatchedVLLMGeneration(VLLMGeneration):
    """TRL's `VLLMGeneration` with public names for its engine's arguments and for the weights that it pushes."""

    def engine_arguments(self) -> dict[str, Any]:
        """Arguments of vLLM's `LLM` in this process beside TRL's own, which has no place for others."""
        return {}

    def _init_vllm(self) -> None:
        if self.mode != "colocate":
            super()._init_vllm()
            return
        original = vllm_generation.LLM
        vllm_generation.LLM = partial(original, **self.engine_arguments())
        try:
            super()._init_vllm()
        finally:
            vllm_generation.LLM = original

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
def generation_class(replacement: Callable[..., VLLMGeneration]) -> Iterator[None]:
    """Make TRL's trainer build `replacement` within the context; it has no argument for the class."""
    original, grpo_trainer.VLLMGeneration = grpo_trainer.VLLMGeneration, replacement
    try:
        yield
    finally:
        grpo_trainer.VLLMGeneration = original
