"""What passes between sampling, scoring and the loss.

Shape legend: B sequences of a process, P prompt tokens (left padding), T completion tokens (right padding).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from logitmix.mixture.diagnostics import MixtureDiagnostics

Batch = dict[str, Any]
"""The rollouts of an outer step, or a micro-batch of them, under TRL's keys and ours:

| key | | |
|---|---|---|
| `prompt_ids`, `prompt_mask` | `[B, P]` | |
| `completion_ids`, `completion_mask` | `[B, T]` | |
| `tool_mask` | `[B, T]` | 0 at tokens that a tool wrote; absent without tools |
| `old_per_token_logps` | `[B, T]` | under the mixture that sampled; absent where TRL needs none: `target.py` |
| `ref_per_token_logps` | `[B, T]` | under the anchor; with `beta > 0` |
| `advantages` | `[B]` | eq. 4 |
| `question_weights` | `[B]` | eq. 6's normaliser; with `loss_type="group"` |
| `rewards` | `[B, F]` | of each reward function |
| `anchor_states` | B | the anchors' last hidden states, one entry a sequence; where they are kept |
| `supports` | B | the tokens that could have been drawn, one entry a sequence; with `score_truncated` |
| `num_items_in_batch` | | completion tokens of all processes |
"""


def own_tokens(batch: Batch) -> Tensor:
    """`[B, T]`: 1 at the completion tokens that the policy wrote, 0 at those of tools and at padding."""
    mask_BT: Tensor = batch["completion_mask"] * batch.get("tool_mask", 1)
    return mask_BT


def scored_inputs(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and labels `[B, P + T]` of prompts and completions, of which the completions are scored."""
    input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[:, : -batch["completion_ids"].shape[1]] = -100
    return input_ids, attention_mask, labels


class TokenScores(NamedTuple):
    """Scores of completion tokens, `[B, T]`, and for a mixture its diagnostics; `aux_loss` is TRL's, of an MoE."""

    log_probs: Tensor
    entropy: Tensor | None
    aux_loss: Tensor | None = None
    diagnostics: MixtureDiagnostics | None = None
