"""Rates and divergences at alphas that were not decoded, from one set of rollouts at one alpha.

Shape legend: A alphas, N rollouts, T tokens of a rollout, K tokens of all rollouts, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from logitmix.evaluation.decode import Decoder
from logitmix.evaluation.requests import Request, Response, make_batches
from logitmix.evaluation.statistics import Estimate, score_interval
from logitmix.mixture.configuration import LogitMixConfig
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.mixture.realignment import alpha_for_kl, coverage, kl_divergence, kl_to_anchor, log_mixture, reweighting
from logitmix.runs.console import progress_bar

LEAST_EFFECTIVE = 30.0  # an interval of fewer effective samples says nothing
LEAST_COVERED = 0.9  # at 0.68 and 0.31, format rates were wrong by 18 and 28 points: benchmarks/results/realign.md
KEPT_TOKENS = 512  # whose members' log-probabilities are kept for a KL budget: 200 MB at 49,152 tokens


@dataclass(frozen=True)
class Rollouts:
    """Sampled responses at one alpha: their tokens, and their grades."""

    alpha: float
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    responses: list[Response]


@dataclass(frozen=True)
class Prediction:
    """What is expected of decoding at `alpha`.

    `kl` is KL(mixture ‖ anchor) in nats a token, on the tokens of the rollouts. `effective` is the effective sample
    size of the rollouts for this alpha, and `covered` the share of its responses that are like one of them; `format`
    and `answer` are None where these are below `LEAST_EFFECTIVE` or `LEAST_COVERED`. Their intervals allow for
    responses that are not covered.
    """

    alpha: float
    kl: float
    effective: float
    covered: float
    format: Estimate | None
    answer: Estimate | None


def validate_geometric(config: LogitMixConfig) -> None:
    """Raise `ValueError` for a mixture that is not the geometric one of two distributions after the same text."""
    config.require_one_prompt("realign")
    if config.scheme != "logit":
        raise ValueError(
            f"the mixture has scheme {config.scheme!r}, and only geometric mixtures (logit) match a KL penalty; "
            "decode it at other alphas with logitmix sweep --mixes prob"
        )
    if config.cut is not None:
        raise ValueError(
            f"the mixture has plausibility {config.plausibility}: it rules out tokens, so that no other alpha is "
            "predicted from its rollouts; save it with config.set_plausibility(None)"
        )


def sample_rollouts(decoder: Decoder, alpha: float, num_samples: int, batch_size: int) -> Rollouts:
    """Sample responses to every problem from the mixture at `alpha`."""
    requests = [Request("mixture", alpha, i, s) for i in range(len(decoder.problems)) for s in range(num_samples)]
    rollouts = Rollouts(alpha, [decoder.prompt_ids[request.problem] for request in requests], [], [])
    with progress_bar() as bar:
        shown = bar.add_task("rollouts", total=len(requests), info="")
        for batch in make_batches(requests, batch_size):
            ids = decoder.complete(batch, lambda *_: bar.advance(shown))
            rollouts.completion_ids.extend(ids)
            rollouts.responses.extend(decoder.respond(*pair) for pair in zip(batch, ids, strict=True))
    return rollouts


@dataclass(frozen=True)
class Scores:
    """Log-probabilities `[A, N]` of rollouts at each alpha, and the mean KL to the anchor over all tokens, `[A]`.

    `policy_KV` and `anchor_KV` are the members' log-probabilities at K of the tokens, evenly spread.
    """

    log_probs_AN: Tensor
    kls_A: Tensor
    policy_KV: Tensor
    anchor_KV: Tensor

    def alpha_for(self, kl_budget: float) -> float:
        """The smallest alpha whose KL to the anchor, on the K tokens, is within the budget."""
        return alpha_for_kl(lambda alpha: float(kl_to_anchor(self.policy_KV, self.anchor_KV, alpha).mean()), kl_budget)


@torch.no_grad()
def score(model: LogitMixForCausalLM, rollouts: Rollouts, alphas: Sequence[float]) -> Scores:
    """Score rollouts under the geometric mixture at each alpha. Members run once a rollout, for all alphas."""
    log_probs_AN = torch.zeros(len(alphas), len(rollouts.completion_ids), dtype=torch.float64)
    sums_A, tokens = torch.zeros(len(alphas), dtype=torch.float64), sum(map(len, rollouts.completion_ids))
    every, before, kept = -(-tokens // KEPT_TOKENS), 0, []
    pairs = zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True)
    for n, (prompt, completion) in enumerate(pairs):
        ids_1T = torch.tensor([[*prompt, *completion]], device=model.device)
        policy_TV, anchor_TV = (
            model(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), use_cache=False, alpha=member)
            .logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
            for member in (0.0, 1.0)
        )  # fmt: skip
        targets_T1 = ids_1T[0, len(prompt) :, None]
        for a, alpha in enumerate(alphas):
            mixed_TV = log_mixture(policy_TV, anchor_TV, alpha)
            log_probs_AN[a, n] = mixed_TV.gather(1, targets_T1).double().sum()
            sums_A[a] += kl_divergence(mixed_TV, anchor_TV).double().sum()
        own = slice(-before % every, None, every)  # each `every`-th token of all rollouts
        kept.append((policy_TV[own].clone(), anchor_TV[own].clone()))  # a view would keep the whole
        before += len(completion)
    policy_KV, anchor_KV = (torch.cat(rows) for rows in zip(*kept, strict=True))
    return Scores(log_probs_AN, sums_A / tokens, policy_KV, anchor_KV)


def predict(
    model: LogitMixForCausalLM, rollouts: Rollouts, alphas: Sequence[float], kl_budget: float | None = None
) -> tuple[list[Prediction], float | None]:
    """A prediction for each alpha, and the alpha that keeps the KL to the anchor within `kl_budget`, if given."""
    scores = score(model, rollouts, [rollouts.alpha, *alphas])
    own_N, *others = scores.log_probs_AN
    found = [
        _prediction(alpha, float(kl), own_N, other_N, rollouts.responses)
        for alpha, kl, other_N in zip(alphas, scores.kls_A[1:], others, strict=True)
    ]
    return found, None if kl_budget is None else scores.alpha_for(kl_budget)


def _prediction(alpha: float, kl: float, own_N: Tensor, other_N: Tensor, responses: Sequence[Response]) -> Prediction:
    weights_N, covered = reweighting(own_N, other_N), coverage(own_N, other_N)
    effective = float(1 / weights_N.square().sum())
    if effective < LEAST_EFFECTIVE or covered < LEAST_COVERED:
        return Prediction(alpha, kl, effective, covered, None, None)
    problems = [response.problem for response in responses]
    rates = (
        reweighted_rate(weights_N, torch.tensor([getattr(response, key) for response in responses]), covered, problems)
        for key in ("format_ok", "answer_ok")
    )
    return Prediction(alpha, kl, effective, covered, *rates)


def reweighted_rate(
    weights_N: Tensor, outcomes_N: Tensor, covered: float = 1.0, problems_N: Sequence[int] | None = None
) -> Estimate:
    """The rate of outcomes under the normalised weights, with its 95 % interval.

    The interval is Wilson's for as many independent outcomes as have the delta method's variance. Rollouts of one
    problem (`problems_N`; by default each has its own) are not independent, and count together. Of the share that is
    not covered, the interval allows for all outcomes or none.
    """
    outcomes_N = outcomes_N.to(weights_N)
    rate = min(float((weights_N * outcomes_N).sum()), 1.0)
    problem_N = torch.arange(len(weights_N)) if problems_N is None else torch.tensor(problems_N)

    def squares(values_N: Tensor) -> float:
        """The sum over problems of the squared sum of values."""
        return float(values_N.new_zeros(int(problem_N.max()) + 1).index_add_(0, problem_N, values_N).square().sum())

    if outcomes_N.min() == outcomes_N.max():
        rate, n = float(outcomes_N[0]), 1 / squares(weights_N)
    else:
        variance, n = squares(weights_N * (outcomes_N - rate)), 1 / float(weights_N.square().sum())
        if variance > 0:  # outcomes that happen to balance within each problem count for no more than the rollouts
            n = min(n, rate * (1 - rate) / variance)
    low, high = score_interval(rate, n)
    return Estimate(rate, covered * low, covered * high + 1 - covered)
