"""alpha against beta on a bandit, in closed form; rates by reweighting against exact ones and against decoding."""

import json
import math

import pytest
import torch
from transformers import AutoTokenizer

from logitmix.cli.__main__ import main
from logitmix.evaluation.decode import make_decoder
from logitmix.evaluation.realignment import (
    KEPT_TOKENS,
    LEAST_EFFECTIVE,
    predict,
    reweighted_rate,
    sample_rollouts,
    score,
)
from logitmix.evaluation.requests import Request
from logitmix.evaluation.statistics import wilson_interval
from logitmix.mixture.diagnostics import mixture_diagnostics
from logitmix.mixture.mixing import mix_logits
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.mixture.realignment import (
    alpha_for_kl,
    coverage,
    equivalent_alpha,
    equivalent_beta,
    kl_to_anchor,
    reweighting,
)
from logitmix.paper.tiny_model import character_tokenizer, tiny_model
from logitmix.runs.files import append_jsonl
from logitmix.tasks import Arithmetic
from tests.helpers.commands import error_of

ARMS = 30


@pytest.fixture
def bandit():
    """The anchor's log-probabilities and the rewards of a bandit's arms, in float64."""
    draw = torch.Generator().manual_seed(0)
    anchor = torch.randn(ARMS, generator=draw, dtype=torch.float64).log_softmax(0)
    return anchor, torch.rand(ARMS, generator=draw, dtype=torch.float64)


def optimum(anchor, reward, beta):
    return (anchor + reward / beta).log_softmax(0)


def mixed(policy, anchor, alpha):
    return ((1 - alpha) * policy + alpha * anchor).log_softmax(0)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("trained_alpha", [0.0, 0.5])
def test_decoding_at_alpha_is_the_optimum_at_the_equivalent_beta(bandit, alpha, trained_alpha):
    anchor, reward = bandit
    beta = 0.2
    trained = optimum(anchor, reward, beta)  # the mixture at trained_alpha, which the training optimises
    policy = ((trained - trained_alpha * anchor) / (1 - trained_alpha)).log_softmax(0)
    expected = optimum(anchor, reward, equivalent_beta(beta, alpha, trained_alpha))
    torch.testing.assert_close(mixed(policy, anchor, alpha), expected)
    target = equivalent_beta(beta, alpha, trained_alpha)
    assert equivalent_alpha(beta, target, trained_alpha) == pytest.approx(alpha, abs=1e-12)


def test_limits_and_errors_of_the_equivalence():
    assert equivalent_beta(0.1, 1.0) == math.inf
    assert equivalent_beta(0.1, 0.5) == pytest.approx(0.2)
    assert equivalent_beta(0.1, 0.0, 0.5) == pytest.approx(0.05)
    with pytest.raises(ValueError, match=r"beta 0.1 is below 0.2, that of the policy alone"):
        equivalent_alpha(0.2, 0.1)
    for arguments in ((0.0, 0.5), (0.1, 1.5), (0.1, 0.5, 1.0)):
        with pytest.raises(ValueError, match="must be"):
            equivalent_beta(*arguments)


def test_the_kl_to_the_anchor_falls_with_alpha_at_the_rate_of_a_variance(bandit):
    anchor, reward = bandit
    policy, step = optimum(anchor, reward, 0.1), 1e-5
    for alpha in (0.0, 0.3, 0.7):
        m = mixed(policy, anchor, alpha).exp()
        gap = policy - anchor
        variance = (m * gap**2).sum() - (m * gap).sum() ** 2
        slope = (kl_to_anchor(policy, anchor, alpha + step) - kl_to_anchor(policy, anchor, alpha)) / step
        assert slope.item() == pytest.approx(-(1 - alpha) * variance.item(), rel=1e-3)
    assert kl_to_anchor(policy, anchor, 1.0) == 0


def test_the_alpha_of_a_budget_uses_it_up(bandit):
    anchor, reward = bandit
    policy = optimum(anchor, reward, 0.1)

    def kl(alpha):
        return kl_to_anchor(policy, anchor, alpha).item()

    for budget in (0.01, 0.3):
        assert kl(alpha_for_kl(kl, budget)) == pytest.approx(budget, rel=1e-6)
    assert alpha_for_kl(kl, 100.0) == 0.0
    with pytest.raises(ValueError, match="must be above 0"):
        alpha_for_kl(kl, 0.0)


def test_a_token_that_a_member_rules_out_has_no_kl_of_nan():
    policy, anchor = torch.tensor([[0.0, 1.0, -math.inf]]), torch.tensor([[0.0, 0.5, -math.inf]])
    for alpha in (0.0, 0.5, 1.0):
        assert 0 <= kl_to_anchor(policy, anchor, alpha).item() < 1


def test_reweighted_rates_match_exact_ones_of_the_bandit(bandit):
    """Each arm as often as its probability at alpha 0.5 says, so that nothing is left to chance."""
    anchor, reward = bandit
    policy, right = optimum(anchor, reward, 0.2), reward > 0.6
    drawn_from = mixed(policy, anchor, 0.5)
    arms = torch.repeat_interleave(torch.arange(ARMS), (drawn_from.exp() * 100_000).round().long())
    for alpha in (0.3, 0.5, 0.7):
        other = mixed(policy, anchor, alpha)
        weights = reweighting(drawn_from[arms], other[arms])
        estimate = reweighted_rate(weights, right[arms])
        assert estimate.value == pytest.approx(other.exp()[right].sum().item(), abs=1e-4)
        assert estimate.low < estimate.value < estimate.high
        exact = 1 / ((other - drawn_from).exp() * other.exp()).sum().item()  # share of samples that count
        assert (1 / weights.square().sum() / len(arms)).item() == pytest.approx(exact, abs=1e-3)


def test_responses_that_were_never_drawn_are_not_covered(bandit):
    """Only arms that the other policy draws less often were drawn; the interval allows for any outcome of the rest."""
    anchor, reward = bandit
    own, other = (mixed(optimum(anchor, reward, 0.2), anchor, alpha) for alpha in (0.5, 0.3))
    (drawn,) = torch.where(other < own)
    arms = torch.repeat_interleave(drawn, (own[drawn].exp() * 100_000).round().long())
    expected = (other[drawn].exp().sum() / own[drawn].exp().sum()).item()
    assert expected < 0.9
    assert coverage(own[arms], other[arms]) == pytest.approx(expected, abs=1e-3)
    assert coverage(own[arms], own[arms]) == 1
    estimate = reweighted_rate(torch.full((100,), 0.01, dtype=torch.float64), torch.ones(100), covered=0.95)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((1, 0.95 * wilson_interval(100, 100)[0], 1))


def test_the_interval_at_equal_weights_is_wilsons():
    for count in (0, 30, 100):
        outcomes = torch.arange(100) < count
        estimate = reweighted_rate(torch.full((100,), 0.01, dtype=torch.float64), outcomes)
        assert (estimate.low, estimate.high) == pytest.approx(wilson_interval(count, 100))


def test_rollouts_of_one_problem_count_together():
    weights, problems = torch.full((100,), 0.01, dtype=torch.float64), [i // 4 for i in range(100)]
    alike = torch.tensor([i % 3 == 0 for i in problems])
    estimate = reweighted_rate(weights, alike, problems_N=problems)
    assert (estimate.low, estimate.high) == pytest.approx(wilson_interval(9, 25)), "25 problems, not 100 rollouts"
    all_right = reweighted_rate(weights, torch.ones(100), problems_N=problems)
    assert (all_right.low, all_right.high) == pytest.approx(wilson_interval(25, 25))
    balanced = reweighted_rate(weights, torch.arange(100) % 2 == 0, problems_N=problems)
    assert (balanced.low, balanced.high) == pytest.approx(wilson_interval(50, 100)), "no more than the rollouts"


# --- rollouts of models -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer(Arithmetic.alphabet)


@pytest.fixture(scope="module")
def pair(tokenizer):
    members = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        members.append(tiny_model(len(tokenizer)).eval())
    return LogitMixForCausalLM.from_members(*members).eval()


def rollouts_at(pair, tokenizer, alpha, problems, samples, seed, tokens):
    task = Arithmetic()
    decoder = make_decoder(pair, tokenizer, task, task.problems("test", problems), tokens, 1.0, seed)
    return sample_rollouts(decoder, alpha, samples, 64)


@torch.no_grad()
def test_scores_match_the_mixture_at_each_alpha(pair, tokenizer):
    rollouts = rollouts_at(pair, tokenizer, 0.5, 2, 2, 0, 5)
    alphas = (0.0, 0.5, 1.0)
    scores = score(pair, rollouts, alphas)
    for a, alpha in enumerate(alphas):
        kls = []
        for n, (prompt, completion) in enumerate(zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True)):
            ids, total = torch.tensor([prompt + completion]), 0.0
            policy, anchor = (member(ids).logits[0].double() for member in pair.members)
            mixture = mix_logits([policy, anchor], (1 - alpha, alpha))
            for t, token in enumerate(completion, start=len(prompt) - 1):
                total += mixture[t].log_softmax(-1)[token].item()
                kls.append(mixture_diagnostics([policy[t], anchor[t]], mixture[t]).kl_K[1].item())
            assert scores.log_probs_AN[a, n].item() == pytest.approx(total, abs=1e-3)
        assert scores.kls_A[a].item() == pytest.approx(sum(kls) / len(kls), abs=1e-4)
    budget = scores.kls_A[1].item()
    assert scores.alpha_for(budget) == pytest.approx(0.5, abs=1e-3)


def test_the_tokens_of_a_budget_are_spread_over_whole_rollouts(pair, tokenizer):
    """Far more tokens than are kept: the kept ones give the alpha of the whole, and no other is in memory."""
    rollouts = rollouts_at(pair, tokenizer, 0.5, 200, 4, 0, 12)
    scores = score(pair, rollouts, (0.5,))
    assert len(scores.policy_KV) <= KEPT_TOKENS < sum(map(len, rollouts.completion_ids)) / 4
    assert scores.policy_KV.untyped_storage().nbytes() == scores.policy_KV.nbytes
    assert scores.alpha_for(scores.kls_A[0].item()) == pytest.approx(0.5, abs=0.05)


def test_predicted_rates_match_decoded_ones(pair, tokenizer):
    """Of the event that a response holds a digit, for want of right answers of random members."""
    drawn, fresh = (rollouts_at(pair, tokenizer, alpha, 8, 100, seed, 3) for alpha, seed in ((0.5, 0), (0.7, 1)))

    def events(rollouts):
        return torch.tensor([any(c.isdigit() for c in row.response[:2]) for row in rollouts.responses])

    own, other = score(pair, drawn, (0.5, 0.7)).log_probs_AN
    predicted = reweighted_rate(reweighting(own, other), events(drawn))
    decoded = events(fresh).double().mean().item()
    error = ((predicted.high - predicted.low) / 3.92) ** 2 + decoded * (1 - decoded) / len(fresh.responses)
    assert abs(predicted.value - decoded) < 4 * error**0.5


def test_rates_are_refused_where_few_rollouts_count(pair, tokenizer):
    rollouts = rollouts_at(pair, tokenizer, 0.5, 2, 20, 0, 8)
    near, far = predict(pair, rollouts, (0.5, 1.0))[0]
    assert near.effective == pytest.approx(40)
    assert near.answer is not None
    assert far.effective < LEAST_EFFECTIVE
    assert (far.format, far.answer) == (None, None)


def test_a_rollout_is_seeded_and_keeps_its_tokens(pair, tokenizer):
    first, again = (rollouts_at(pair, tokenizer, 0.5, 2, 3, 7, 6) for _ in range(2))
    assert first.completion_ids == again.completion_ids
    assert len({tuple(ids) for ids in first.completion_ids}) > 1
    assert [Request("mixture", 0.5, r.problem, r.sample) for r in first.responses] == [
        Request("mixture", 0.5, i, s) for i in range(2) for s in range(3)
    ]
    for ids, row in zip(first.completion_ids, first.responses, strict=True):
        assert tokenizer.decode(ids, skip_special_tokens=True) == row.response


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command_prints_and_writes_the_predictions(members, tmp_path, capsys):
    base, sft = members
    path = tmp_path / "realign.json"
    argv = ["realign", "--model_name_or_path", base, "--anchor", sft, "--eval_limit", "10", "--max_new_tokens", "4"]
    argv += ["--alphas", "0.5", "1.0", "--beta", "0.1", "--kl_budget", "0.05", "--output_file", str(path)]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "predicted from 40 rollouts at alpha 0.5" in " ".join(printed.split())
    assert "The smallest alpha within 0.05 nats a token of the anchor is 0." in printed
    numbers = json.loads(path.read_text())
    assert [(row["alpha"], row["beta"]) for row in numbers["predictions"]] == [(0.5, 0.2), (1.0, None)]
    assert (numbers["alpha"], numbers["trained_alpha"]) == (0.5, 0.0), "of an untrained pair"
    assert 0 < numbers["kl_budget_alpha"] < 1
    assert numbers["predictions"][1]["kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--alphas", "1.5"], "alpha 1.5 is not from 0"),
        (["--kl_budget", "0"], "kl_budget is 0.0, but must be above 0"),
        (["--beta", "-1"], "beta is -1.0, but must be above 0"),
        (["--output_file", "no/such/folder.json"], "is in no folder"),
        (["--output_file", "."], "is a folder; give a file in it"),
    ],
)
def test_wrong_values_are_refused(members, capsys, flags, message):
    assert message in error_of(capsys, ["realign", "--model_name_or_path", members[0], "--anchor", members[1], *flags])


def test_a_trained_mixture_is_realigned_from_its_own_alpha(members, tmp_path, capsys):
    mixture = LogitMixForCausalLM.from_members(*members, 0.25)
    mixture.save_pretrained(tmp_path / "run")
    AutoTokenizer.from_pretrained(members[0]).save_pretrained(tmp_path / "run")
    append_jsonl(tmp_path / "run" / "run.jsonl", [{"arguments": {"command": "train", "task": "arithmetic"}}])
    argv = ["realign", "--model_name_or_path", str(tmp_path / "run"), "--eval_limit", "8", "--max_new_tokens", "2"]
    assert main([*argv, "--alphas", "0.5", "--output_file", str(tmp_path / "out.json")]) == 0
    numbers = json.loads((tmp_path / "out.json").read_text())
    assert (numbers["alpha"], numbers["trained_alpha"]) == (0.25, 0.25)
    assert numbers["predictions"][0]["beta"] == pytest.approx(0.75 / 0.5)
    assert "after a training with beta 1 at alpha 0.25" in " ".join(capsys.readouterr().out.split())


def test_a_mixture_that_is_not_geometric_is_refused(members, tmp_path, capsys):
    LogitMixForCausalLM.from_members(*members, 0.5, scheme="prob").save_pretrained(tmp_path / "prob")
    AutoTokenizer.from_pretrained(members[0]).save_pretrained(tmp_path / "prob")
    message = error_of(capsys, ["realign", "--model_name_or_path", str(tmp_path / "prob")])
    assert "the mixture has scheme 'prob'" in message
