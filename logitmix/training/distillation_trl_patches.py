"""What distillation replaces in TRL's `DistillationTrainer`, and the private names of TRL it reads.

| TRL 1.16 | here | |
|---|---|---|
| `_compute_loss` | `loss` | the loss of a micro-batch, inside the student's (wrapped) forward |
| `_generate_single_turn` | `sample` | completions of prompts |
| `_tokenize_prompts` | `check_prompts` | the prompts of an update, as token ids |
| `_get_train_sampler` | `train_sampler` | the order of prompts |

Its own `_compute_loss` reads the teacher's backbone and one `lm_head`, which a mixture does not have.

Written against TRL 1.16; tests/training/test_distillation_trl_patches.py is the contract.

Shape legend: B sequences of a process, T tokens.
"""

from typing import Any

from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DistillationTrainer
from trl.data_utils import is_conversational

from logitmix.mixture.tokenizers import chat_template_errors, validate_chat_template, validate_no_chat_template_kwargs
from logitmix.training.checkpointing.resume import by_epoch
from logitmix.training.rollouts.trl_patches import GatheredGeneration
from logitmix.training.transformers_patches import PatchedTrainer
from logitmix.training.trl_patches import PatchedTRLTrainer


class PatchedDistillationTrainer(PatchedTRLTrainer, GatheredGeneration, DistillationTrainer):
    """TRL's `DistillationTrainer` with exact resume, and public names for what a subclass overrides."""

    RUNNING_TOTALS = (*PatchedTrainer.RUNNING_TOTALS, "_total_train_tokens", "_step")
    _tag_names = ("trl", "distillation", "logitmix")  # of the model card

    def loss(self, student: PreTrainedModel, batch: dict[str, Any], num_tokens: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, the sum of the student's entropies, and the number of tokens.

        `num_tokens` is what the sum over tokens is divided by: None for their own number.
        """
        raise NotImplementedError

    def check_prompts(self, prompt_ids: list[list[int]]) -> None:
        """Called with the prompts of an update before anything is sampled."""

    def sample(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> list[list[int]]:
        """A completion of each prompt, as token ids."""
        return super()._generate_single_turn(prompt_ids, *args, **kwargs)

    def train_sampler(self, dataset: Any = None) -> Sampler:
        """The order of prompts; unlike TRL's, it is the same in an epoch whether or not the run was resumed."""
        return by_epoch(super()._get_train_sampler(dataset))

    def tokenize_prompts(self, prompts: list) -> list[list[int]]:
        """The ids of each prompt, as they are sampled from."""
        prompt_ids: list[list[int]] = self._tokenized(prompts)[0]
        return prompt_ids

    @property
    def text_tokenizer(self) -> PreTrainedTokenizerBase:
        return self._tokenizer

    # --- TRL's private methods, routed to the names above -------------------------------------------------------

    def _compute_loss(self, unwrapped_student: Any, inputs: Any, num_items_in_batch: Any) -> Any:
        return self.loss(unwrapped_student, inputs, num_items_in_batch)

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> list[list[int]]:
        return self.sample(prompt_ids, *args, **kwargs)

    def _tokenize_prompts(self, prompts: list) -> tuple:
        tokenized = self._tokenized(prompts)
        self.check_prompts(tokenized[0])
        return tokenized

    def _tokenized(self, prompts: list) -> tuple:
        """As TRL's, with one sentence for a chat template that fails, or leaves out the messages' texts."""
        if not is_conversational({"prompt": prompts[0]}):
            validate_no_chat_template_kwargs(self.chat_template_kwargs)
        elif not self._is_vlm:
            validate_chat_template(self._tokenizer, self.chat_template_kwargs)
        with chat_template_errors(self._tokenizer):
            tokenized: tuple = super()._tokenize_prompts(prompts)
        return tokenized

    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        return self.train_sampler(dataset)
