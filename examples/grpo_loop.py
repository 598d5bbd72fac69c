"""Reinforcement learning through logit averaging: the whole algorithm in one file of plain PyTorch.

This is Algorithm 1 (fixed weight) of Gan & Zhu, arXiv 2605.20555, on a task that a CPU learns in minutes. It trains
the policy θ beside a frozen anchor with the same vocabulary. It is GRPO, except that

- rollouts are sampled, token by token, from the *mixture* softmax((1-α) z_θ + α z_ref), not from the policy;
- the probability ratio is that of the mixture: π_mix,θ / π_mix,θ_old. The policy alone is never scored;
- the gradient reaches only θ, with the factor (1-α); the anchor's logits are constants;
- the normaliser is the number of tokens in a question's whole group, not in one rollout or in the batch;
- there is no KL penalty (the anchor already contributes to every token) and, as in GRPO, no critic.

    python examples/grpo_loop.py                                   # about two minutes
    python examples/grpo_loop.py --steps 2 --pretrain-steps 5      # a quick check that it runs

Read it from top to bottom: the equations, a task and two small models to try them on, and the loop. It imports only
the arithmetic task from logitmix, because the library's trainer is tested against it. Not included: several anchors,
probability averaging, the adaptive weight (Algorithm 2), gradient accumulation and other conveniences.

Tensor names end in their axes: B sequences, T time, V vocabulary, Q questions, G rollouts per question (its group).
Sequences are ordered by question, so B = Q · G. Prompts are padded on the left and completions on the right, so the
completion begins in the same column of every row.
"""

import argparse
import copy
import time
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from logitmix.tasks import Arithmetic

# --- the mixture as a distribution to sample from ------------------------------------------------------------------


def mix(policy_logits_BTV: Tensor, anchor_logits_BTV: Tensor, alpha: float) -> Tensor:
    """Eq. 1: z_mix = (1-α) z_θ + α z_ref, in float32 at least. α is the weight of the anchor."""
    dtype = torch.promote_types(policy_logits_BTV.dtype, torch.float32)
    return (1 - alpha) * policy_logits_BTV.to(dtype) + alpha * anchor_logits_BTV.to(dtype)


def positions(attention_mask_BT: Tensor) -> Tensor:
    """Number the real tokens of each row from 0, whatever padding precedes them."""
    return (attention_mask_BT.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def sample(
    policy: PreTrainedModel,
    anchor: PreTrainedModel,
    prompt_ids_BT: Tensor,
    prompt_mask_BT: Tensor,
    alpha: float,
    temperature: float,
    max_new_tokens: int,
    eos_token_id: int,
    pad_token_id: int,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Eq. 3: y_t ~ softmax(z_mix / temperature), token by token, with a KV cache for each member.

    Returns the completions and their mask, both `[B, T]`. A completion includes its end-of-sequence token; what
    follows is padding, with mask 0.
    """
    mask_BT, completion_BT, completion_mask_BT = prompt_mask_BT, [], []
    alive_B = torch.ones(len(prompt_ids_BT), dtype=torch.bool, device=prompt_ids_BT.device)
    new_ids_BT, caches = prompt_ids_BT, [None, None]
    for _ in range(max_new_tokens):
        position_ids_BT = positions(mask_BT)[:, -new_ids_BT.shape[1] :]
        outputs = [
            member(
                input_ids=new_ids_BT,
                attention_mask=mask_BT,
                position_ids=position_ids_BT,
                past_key_values=cache,
                use_cache=True,
            )
            for member, cache in zip((policy, anchor), caches, strict=True)
        ]
        caches = [output.past_key_values for output in outputs]
        policy_logits_BV, anchor_logits_BV = (output.logits[:, -1] for output in outputs)
        probs_BV = torch.softmax(mix(policy_logits_BV, anchor_logits_BV, alpha) / temperature, dim=-1)
        token_B = torch.multinomial(probs_BV, 1, generator=generator)[:, 0]

        completion_BT.append(torch.where(alive_B, token_B, pad_token_id))
        completion_mask_BT.append(alive_B.to(mask_BT.dtype))
        alive_B = alive_B & (token_B != eos_token_id)
        if not alive_B.any():
            break
        new_ids_BT = completion_BT[-1][:, None]
        mask_BT = torch.cat([mask_BT, completion_mask_BT[-1][:, None]], dim=1)
    return torch.stack(completion_BT, dim=1), torch.stack(completion_mask_BT, dim=1)


def token_log_probs(
    policy: PreTrainedModel,
    anchor: PreTrainedModel,
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor,
    num_completion_tokens: int,
    alpha: float,
    temperature: float,
) -> Tensor:
    """log π_mix(y_t | x, y_<t) of the last `num_completion_tokens` columns, `[B, num_completion_tokens]`.

    The distribution is the one that `sample` samples from, including the temperature. Only the policy has gradients.
    """
    inputs = {
        "input_ids": input_ids_BT,
        "attention_mask": attention_mask_BT,
        "position_ids": positions(attention_mask_BT),
    }
    predicting = slice(-num_completion_tokens - 1, -1)  # the logits at one column predict the token of the next
    policy_logits_BTV = policy(**inputs).logits[:, predicting]
    with torch.no_grad():
        anchor_logits_BTV = anchor(**inputs).logits[:, predicting]
    log_probs_BTV = torch.log_softmax(mix(policy_logits_BTV, anchor_logits_BTV, alpha) / temperature, dim=-1)
    completion_BT = input_ids_BT[:, -num_completion_tokens:]
    return log_probs_BTV.gather(-1, completion_BT[..., None])[..., 0]


# --- the objective ---------------------------------------------------------------------------------------------------


def advantages(rewards_QG: Tensor, eps: float = 1e-6) -> Tensor:
    """Eq. 4: A_i = (R_i - mean(R)) / (std(R) + ε) within each group, std unbiased; 0 where all rewards are equal."""
    centred_QG = rewards_QG - rewards_QG.mean(-1, keepdim=True)
    if rewards_QG.shape[1] == 1:  # the unbiased std of a single value is nan
        return centred_QG
    return centred_QG / (rewards_QG.std(-1, keepdim=True) + eps)


def group_loss(
    log_probs_BT: Tensor,
    old_log_probs_BT: Tensor,
    advantages_QG: Tensor,
    completion_mask_BT: Tensor,
    clip: float = 0.2,
) -> Tensor:
    """Eq. 5 and 6, negated to be minimised; ρ is the ratio of the mixture to the mixture that sampled:

        - mean over questions of  1/(Σ_i |y_i|) Σ_i Σ_t min(ρ_it A_i, clip(ρ_it, 1-ε, 1+ε) A_i)

    A question without completion tokens contributes 0.
    """
    Q, G = advantages_QG.shape
    padding_BT = completion_mask_BT == 0
    # Mask before exp, not by a weight of 0 after it: an infinite ratio times 0 would be nan
    ratio_BT = (log_probs_BT - old_log_probs_BT).masked_fill(padding_BT, 0.0).exp()
    advantages_B1 = advantages_QG.reshape(Q * G, 1)
    gain_BT = torch.minimum(ratio_BT * advantages_B1, ratio_BT.clamp(1 - clip, 1 + clip) * advantages_B1)
    gain_Q = gain_BT.masked_fill(padding_BT, 0.0).reshape(Q, -1).sum(-1)
    num_tokens_Q = completion_mask_BT.reshape(Q, -1).sum(-1)
    return -(gain_Q / num_tokens_Q.clamp(min=1)).mean()


# --- a task, and two members that differ as the paper's do: one can reason, one knows the format --------------------

PAD, EOS = 0, 1  # the characters follow from 2 on
BATCH = 32  # batch size of pretraining and SFT


def encode(text: str) -> list[int]:
    return [Arithmetic.alphabet.index(character) + 2 for character in text]


def decode(ids_T: Tensor) -> str:
    return "".join(Arithmetic.alphabet[i - 2] for i in ids_T.tolist() if i not in (PAD, EOS))


def pad(rows: list[list[int]], value: int, left: bool = False) -> Tensor:
    width = max(map(len, rows))
    padding = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([gap + row if left else row + gap for row, gap in zip(rows, padding, strict=True)])


def encode_prompts(prompts: list[str]) -> tuple[Tensor, Tensor]:
    rows = [encode(prompt) for prompt in prompts]
    return pad(rows, PAD, left=True), pad([[1] * len(row) for row in rows], 0, left=True)


def tiny_model() -> Qwen2ForCausalLM:
    """An untrained Qwen2 of about 0.4M parameters, with a token for each character of the task."""
    config = Qwen2Config(
        vocab_size=len(Arithmetic.alphabet) + 2,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.06,  # the usual 0.02 suits wide models; a narrow one learns faster from this
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def fit(model: PreTrainedModel, rows: list[dict[str, str]], learning_rate: float, batch_size: int = BATCH) -> None:
    """Fit the completions, given their prompts, by maximum likelihood in one pass over the rows."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for start in range(0, len(rows), batch_size):
        progress = (start + 0.5 * batch_size) / len(rows)
        optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, 10 * progress) * (1 - progress)
        batch = rows[start : start + batch_size]
        pairs = [(encode(row["prompt"]), [*encode(row["completion"]), EOS]) for row in batch]
        input_ids_BT = pad([prompt + completion for prompt, completion in pairs], PAD)
        labels_BT = pad([[-100] * len(prompt) + completion for prompt, completion in pairs], -100)
        logits_BTV = model(input_ids=input_ids_BT).logits[:, :-1]  # causal: right padding is never attended to
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


# --- Algorithm 1 -----------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> list[dict[str, float]]:
    parser = argparse.ArgumentParser(description="Reinforcement learning through logit averaging, in one file.")
    parser.add_argument("--steps", type=int, default=20, help="T: outer steps, each on one batch of rollouts")
    parser.add_argument("--questions", type=int, default=32, help="|D_b|: questions per batch")
    parser.add_argument("--group", type=int, default=8, help="G: rollouts per question")
    parser.add_argument("--updates", type=int, default=2, help="μ: updates per batch of rollouts")
    parser.add_argument("--alpha", type=float, default=0.5, help="weight of the anchor")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--clip", type=float, default=0.2, help="ε of eq. 6")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--pretrain-steps", type=int, default=600, help=f"batches of {BATCH} to pretrain the base")
    parser.add_argument(
        "--sft-steps", type=int, default=40, help=f"batches of {BATCH} to fine-tune the anchor from it"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    task = Arithmetic(seed=args.seed)
    started = time.monotonic()
    policy = tiny_model()
    fit(policy, task.base_corpus(BATCH * args.pretrain_steps), learning_rate=3e-3)
    anchor = copy.deepcopy(policy)
    fit(anchor, task.demonstrations(BATCH * args.sft_steps), learning_rate=1e-3)
    anchor.requires_grad_(False)
    print(f"trained base and anchor in {time.monotonic() - started:.0f} s; now {args.steps} steps at α = {args.alpha}")

    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    problems = iter(task.problems("train", args.steps * args.questions))
    history = []
    for step in range(args.steps):
        # Sample G rollouts of each question from the mixture with the current θ, which is θ_old from here on
        batch = list(islice(problems, args.questions))
        rollout_of = [problem for problem in batch for _ in range(args.group)]
        prompt_ids_BT, prompt_mask_BT = encode_prompts([task.prompt(problem) for problem in rollout_of])
        completion_BT, completion_mask_BT = sample(
            policy,
            anchor,
            prompt_ids_BT,
            prompt_mask_BT,
            args.alpha,
            args.temperature,
            args.max_new_tokens,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
        # r = 1 only if the answer is correct and in the required format
        grades = [task.grade(decode(ids_T), problem) for ids_T, problem in zip(completion_BT, rollout_of, strict=True)]
        rewards_QG = torch.tensor([float(grade.answer_ok) for grade in grades]).view(-1, args.group)
        advantages_QG = advantages(rewards_QG)

        input_ids_BT = torch.cat([prompt_ids_BT, completion_BT], dim=1)
        attention_mask_BT = torch.cat([prompt_mask_BT, completion_mask_BT], dim=1)
        scored = (input_ids_BT, attention_mask_BT, completion_BT.shape[1], args.alpha, args.temperature)
        with torch.no_grad():
            old_log_probs_BT = token_log_probs(policy, anchor, *scored)
        for _ in range(args.updates):
            log_probs_BT = token_log_probs(policy, anchor, *scored)
            loss = group_loss(log_probs_BT, old_log_probs_BT, advantages_QG, completion_mask_BT, args.clip)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        formatted = sum(grade.format_ok for grade in grades) / len(grades)
        history.append({"reward": rewards_QG.mean().item(), "format": formatted, "loss": loss.item()})
        print(f"step {step + 1:3d}  " + "  ".join(f"{name} {value:7.4f}" for name, value in history[-1].items()))
    return history


if __name__ == "__main__":
    main()
