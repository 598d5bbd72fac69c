"""The sequences that are being decoded: their tokens, of different lengths, and the drafts that await verification.

Shape legend: K members, B sequences not yet ended, P slots of the prompts, T new tokens, N drafts, V vocabulary;
L slots for tokens: prompt, new tokens, and drafts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.generation import BaseStreamer

from logitmix.mixture.decoding.pass_costs import MAX_DRAFTS


@dataclass
class FinishedSequences:
    """All sequences of the batch, in its order: what `OpenSequences` has written of each so far."""

    tokens_BL: Tensor  # padded on the right
    length_B: Tensor
    member_logprobs_BTK: Tensor | None


class OpenSequences:
    """The sequences of a batch that have not ended, each of which has at least one token.

    `drafts_BN` are the tokens that one member proposes to follow each sequence, of which the first `num_drafts_B`
    count; they are also written into `tokens_BL`, behind the sequence.

    Args:
        prompt_BP: the prompts, padded on the left where `prompt_mask_BP` is 0.
        weights_BK: the members' weights, on the CPU.
        max_length: the most tokens of a sequence, with its prompt and padding.
        pad_token_id: follows the end of a sequence.
        output_member_logprobs: keep each member's log-probability of every token.
        streamer: is given the tokens of a single sequence.
    """

    _BY_ROW = (
        "index_B", "prompt_BP", "prompt_mask_BP", "weights_BK", "tokens_BL", "length_B", "drafts_BN", "num_drafts_B"
    )  # fmt: skip

    def __init__(
        self,
        prompt_BP: Tensor,
        prompt_mask_BP: Tensor,
        weights_BK: Tensor,
        max_length: int,
        pad_token_id: int,
        output_member_logprobs: bool = False,
        streamer: BaseStreamer | None = None,
    ) -> None:
        (B, P), K = prompt_BP.shape, weights_BK.shape[-1]
        self.index_B = torch.arange(B, device=prompt_BP.device)
        self.prompt_BP, self.prompt_mask_BP, self.weights_BK = prompt_BP, prompt_mask_BP, weights_BK
        self.tokens_BL = prompt_BP.new_full((B, max_length + MAX_DRAFTS), pad_token_id)
        self.tokens_BL[:, :P] = prompt_BP
        self.length_B = prompt_BP.new_full((B,), P)
        self._max_length, self._pad_token_id, self._streamer = max_length, pad_token_id, streamer
        self.finished = FinishedSequences(
            self.tokens_BL[:, :max_length].clone(),
            self.length_B.clone(),
            torch.zeros(B, max_length - P, K, device=prompt_BP.device) if output_member_logprobs else None,
        )
        self.forget_drafts()

    def __len__(self) -> int:
        return len(self.index_B)

    # --- tokens ---------------------------------------------------------------------------------------------------

    def append(self, rows: Tensor, tokens_B: Tensor, logits_KBV: Sequence[Tensor]) -> None:
        """Append a token to the sequences at `rows`; `logits_KBV` are the members' logits of it."""
        slots_B, index_B, finished = self.length_B[rows], self.index_B[rows], self.finished
        self.tokens_BL[rows, slots_B] = tokens_B
        self.length_B[rows] += 1
        finished.tokens_BL[index_B, slots_B] = tokens_B
        finished.length_B[index_B] += 1
        if finished.member_logprobs_BTK is not None:
            log_probs_KBV = [z_BV.float().log_softmax(-1) for z_BV in logits_KBV]
            log_probs_BK = torch.cat([log_probs_BV.gather(1, tokens_B[:, None]) for log_probs_BV in log_probs_KBV], 1)
            finished.member_logprobs_BTK[index_B, slots_B - self.prompt_BP.shape[1]] = log_probs_BK
        if self._streamer is not None:
            self._streamer.put(tokens_B.cpu())

    def completions(self, rows: Tensor) -> Iterator[tuple[int, list[int]]]:
        """The index in the batch and the new tokens of each sequence at `rows`."""
        P = self.prompt_BP.shape[1]
        for i, tokens, length in zip(
            self.index_B[rows].tolist(), self.tokens_BL[rows].tolist(), self.length_B[rows].tolist(), strict=True
        ):
            yield i, tokens[P:length]

    def select(self, rows: Tensor) -> None:
        """Keep the sequences at the indices `rows` only. Drafts' logits are not kept: verify them first."""
        for name in self._BY_ROW:
            values = getattr(self, name)
            setattr(self, name, values[rows.to(values.device)])

    # --- drafts ---------------------------------------------------------------------------------------------------

    def num_free_slots(self) -> int:
        """How many tokens the longest sequence may still get."""
        return self._max_length - int(self.length_B.max())

    @property
    def last_B(self) -> Tensor:
        """The last draft of each sequence, or its last token if it has none."""
        return self.tokens_BL.gather(1, (self.length_B + self.num_drafts_B - 1)[:, None]).squeeze(1)

    def forget_drafts(self) -> None:
        """Have no drafts."""
        self.start_drafts(0, torch.zeros(0, 0))

    def start_drafts(self, num_drafts: int, logits_BV: Tensor) -> None:
        """Forget all drafts, and make room for `num_drafts` that are drawn from logits like `logits_BV`."""
        shape = len(self), num_drafts, logits_BV.shape[1]
        self.drafts_BN = self.tokens_BL.new_full(shape[:2], self._pad_token_id)
        self.num_drafts_B = torch.zeros_like(self.length_B)
        self._log_q_BNV, self._logits_BNV = logits_BV.new_empty(shape, dtype=torch.float32), logits_BV.new_empty(shape)

    def add_drafts(self, rows: Tensor, drafts_B: Tensor, log_q_BV: Tensor, logits_BV: Tensor) -> None:
        """Add a draft to the sequences at `rows`, with the distribution that drew it and the drafter's logits."""
        slots_B = self.num_drafts_B[rows]
        self.drafts_BN[rows, slots_B] = drafts_B
        self.tokens_BL[rows, self.length_B[rows] + slots_B] = drafts_B
        self._log_q_BNV[rows, slots_B], self._logits_BNV[rows, slots_B] = log_q_BV, logits_BV
        self.num_drafts_B[rows] += 1

    def draft(self, rows: Tensor, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draft i of the sequences at `rows`: its token `[B]`, `log q` and the drafter's logits, both `[B, V]`."""
        return self.drafts_BN[rows, i], self._log_q_BNV[rows, i], self._logits_BNV[rows, i]
