"""Log-probabilities and entropy of the mixture compared with the plain computation in float64.

Shape legend: K members, B batch, T time, V vocabulary.
"""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from logitmix.mixture import logprobs as log_probs_module
from logitmix.mixture.logprobs import log_probs_and_entropy, mixture_log_probs
from logitmix.mixture.mixing import SCHEMES, mix_logits
from tests.helpers.random_logits import draw_logits

INF = torch.inf
B, T, V = 5, 4, 7
random_logits = partial(draw_logits, (B, T, V))
TARGETS_BT = torch.arange(B * T).reshape(B, T) % V
both_schemes = pytest.mark.parametrize("scheme", SCHEMES)
temperatures = pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])


def naive(logits: list[Tensor], weights: list[float], scheme: str, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropy from the distribution itself, in float64."""
    probs = [z.double().softmax(-1) for z in logits]
    if scheme == "prob":
        mixture_BTV = sum(w * p for w, p in zip(weights, probs, strict=True))
    else:
        mixture_BTV = math.prod(p**w for w, p in zip(weights, probs, strict=True))
    mixture_BTV = mixture_BTV ** (1 / temperature)
    mixture_BTV = mixture_BTV / mixture_BTV.sum(-1, keepdim=True)
    picked_BT = torch.stack([mixture_BTV[b, t, TARGETS_BT[b, t]] for b in range(B) for t in range(T)]).view(B, T)
    return picked_BT.log(), -(mixture_BTV * mixture_BTV.log()).sum(-1)


@both_schemes
@temperatures
@pytest.mark.parametrize("weights", [[0.7, 0.3], [0.0, 1.0], [0.2, 0.5, 0.3]])
def test_matches_the_definition(scheme, temperature, weights):
    logits = random_logits(len(weights))
    log_probs, entropy = mixture_log_probs(logits, weights, TARGETS_BT, scheme, temperature)
    expected_log_probs, expected_entropy = naive(logits, weights, scheme, temperature)
    torch.testing.assert_close(log_probs, expected_log_probs, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(entropy, expected_entropy, rtol=1e-11, atol=1e-12)


@both_schemes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_are_scored_in_float32(scheme, dtype):
    logits = random_logits(2, dtype)
    log_probs, entropy = mixture_log_probs(logits, [0.4, 0.6], TARGETS_BT, scheme, 0.8)
    assert log_probs.dtype == entropy.dtype == torch.float32
    expected_log_probs, expected_entropy = naive(logits, [0.4, 0.6], scheme, 0.8)
    torch.testing.assert_close(log_probs.double(), expected_log_probs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-5, atol=1e-5)


@both_schemes
def test_the_temperature_divides_the_mixture_not_its_members(scheme):
    logits = random_logits()
    log_probs, _ = mixture_log_probs(logits, [0.4, 0.6], TARGETS_BT, scheme, 0.5)
    sampled_BTV = torch.log_softmax(mix_logits(logits, [0.4, 0.6], scheme) / 0.5, dim=-1)
    torch.testing.assert_close(log_probs, sampled_BTV.gather(-1, TARGETS_BT[..., None])[..., 0])
    if scheme == "prob":  # for the scheme logit both are the same
        members_first, _ = mixture_log_probs([z / 0.5 for z in logits], [0.4, 0.6], TARGETS_BT, scheme)
        assert (members_first - log_probs).abs().max() > 0.01


@both_schemes
@pytest.mark.parametrize("rows", [1, 2, 3, B])
@pytest.mark.parametrize("weights", [[0.3, 0.7], [[0.1 * b, 1 - 0.1 * b] for b in range(B)]], ids=["one", "rows"])
def test_chunks_change_neither_values_nor_gradients(monkeypatch, scheme, rows, weights):
    def scores_and_gradients() -> list[Tensor]:
        logits = [z.requires_grad_() for z in random_logits(2, torch.float32)]
        log_probs, entropy = mixture_log_probs(logits, weights, TARGETS_BT, scheme, 0.9)
        sums = (log_probs * torch.linspace(-1, 1, T)).sum() + 0.1 * entropy.sum()
        return [log_probs.detach(), entropy.detach(), *torch.autograd.grad(sums, logits)]

    calls = []
    monkeypatch.setattr(
        log_probs_module, "mix_logits", lambda zs, *args: calls.append(len(zs[0])) or mix_logits(zs, *args)
    )
    whole = scores_and_gradients()
    assert set(calls) == {B}
    calls.clear()
    monkeypatch.setattr(log_probs_module, "_CHUNK_ELEMENTS", rows * T * V)
    chunked = scores_and_gradients()
    assert max(calls) == rows
    for actual, expected in zip(chunked, whole, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


def test_a_sequence_larger_than_a_chunk_is_not_split(monkeypatch):
    logits = random_logits()
    expected = mixture_log_probs(logits, [0.5, 0.5], TARGETS_BT)
    monkeypatch.setattr(log_probs_module, "_CHUNK_ELEMENTS", 1)
    torch.testing.assert_close(mixture_log_probs(logits, [0.5, 0.5], TARGETS_BT), expected)


@both_schemes
@temperatures
def test_gradients_match_the_plain_computation(scheme, temperature):
    logits = [z.requires_grad_() for z in random_logits(3)]
    weights = [0.2, 0.5, 0.3]
    upstream = torch.randn(2, B, T, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def gradients(scores: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad((torch.stack(scores) * upstream).sum(), logits)

    fused = gradients(mixture_log_probs(logits, weights, TARGETS_BT, scheme, temperature))
    plain = gradients(naive(logits, weights, scheme, temperature))
    for actual, expected in zip(fused, plain, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@both_schemes
def test_gradcheck(scheme):
    logits = [z[:2, :2, :5].clone().requires_grad_() for z in random_logits()]
    targets = TARGETS_BT[:2, :2] % 5
    assert torch.autograd.gradcheck(lambda *zs: mixture_log_probs(zs, [0.3, 0.7], targets, scheme, 0.8), logits)


@both_schemes
def test_only_the_members_logits_are_saved_for_the_backward_pass(scheme):
    logits = [z.requires_grad_() for z in random_logits(2, torch.float32)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        mixture_log_probs(logits, [0.3, 0.7], TARGETS_BT, scheme, 0.8)
    of_vocabulary_size = [x for x in kept if x.shape[-1:] == (V,) and x.numel() >= V * T]
    members = {z.data_ptr() for z in logits}
    assert all(x.data_ptr() in members for x in of_vocabulary_size)


def test_no_graph_without_gradients():
    policy, anchor = random_logits()
    log_probs, entropy = mixture_log_probs([policy, anchor], [0.5, 0.5], TARGETS_BT)
    assert not log_probs.requires_grad
    with torch.no_grad():
        log_probs, entropy = mixture_log_probs([policy.requires_grad_(), anchor], [0.5, 0.5], TARGETS_BT)
    assert not log_probs.requires_grad
    assert not entropy.requires_grad


def test_a_frozen_anchor_gets_no_gradient():
    policy, anchor = random_logits()
    policy.requires_grad_()
    mixture_log_probs([policy, anchor], [0.5, 0.5], TARGETS_BT)[0].sum().backward()
    assert policy.grad.abs().sum() > 0
    assert anchor.grad is None


@both_schemes
def test_a_row_of_nan_is_ignored_at_weight_0(scheme):
    policy, anchor = (z.requires_grad_() for z in random_logits(2, torch.float32))
    with torch.no_grad():
        anchor[1] = torch.nan
    weights = [[0.5, 0.5], [1.0, 0.0], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]
    log_probs, entropy = mixture_log_probs([policy, anchor], weights, TARGETS_BT, scheme)
    (log_probs.sum() + entropy.sum()).backward()
    for tensor in (log_probs, entropy, policy.grad, anchor.grad):
        assert torch.isfinite(tensor).all()


# --- log_probs_and_entropy ---------------------------------------------------------------------------------------


@temperatures
def test_matches_torch_distributions(temperature):
    (z_BTV,) = random_logits(1)
    categorical = torch.distributions.Categorical(logits=z_BTV / temperature)
    log_probs, entropy = log_probs_and_entropy(z_BTV, TARGETS_BT, temperature)
    torch.testing.assert_close(log_probs, categorical.log_prob(TARGETS_BT))
    torch.testing.assert_close(entropy, categorical.entropy())


def test_entropy_of_uniform_and_certain_distributions():
    z_BTV = torch.tensor([[[0.0] * 8, [0.0] + [-1e4] * 7, [0.0] + [-INF] * 7]])
    log_probs, entropy = log_probs_and_entropy(z_BTV, torch.zeros(1, 3, dtype=torch.long))
    torch.testing.assert_close(entropy, torch.tensor([[math.log(8), 0.0, 0.0]]))
    torch.testing.assert_close(log_probs, torch.tensor([[-math.log(8), 0.0, 0.0]]))


@temperatures
def test_tokens_of_probability_0_add_nothing(temperature):
    (allowed,) = random_logits(1)
    with_ruled_out = torch.cat([allowed, torch.full((B, T, 3), -INF, dtype=torch.float64)], dim=-1)
    with_ruled_out.requires_grad_()
    log_probs, entropy = log_probs_and_entropy(with_ruled_out, TARGETS_BT, temperature)
    torch.testing.assert_close((log_probs, entropy), log_probs_and_entropy(allowed, TARGETS_BT, temperature))

    (log_probs.sum() + entropy.sum()).backward()
    plain = allowed.clone().requires_grad_()
    sum(scores.sum() for scores in log_probs_and_entropy(plain, TARGETS_BT, temperature)).backward()
    torch.testing.assert_close(with_ruled_out.grad[..., :V], plain.grad)
    assert (with_ruled_out.grad[..., V:] == 0).all()


def test_a_target_of_probability_0_scores_minus_infinity():
    log_probs, entropy = log_probs_and_entropy(torch.tensor([[[0.0, 0.0, -INF]]]), torch.tensor([[2]]))
    assert log_probs.item() == -INF
    torch.testing.assert_close(entropy, torch.tensor([[math.log(2)]]))


@both_schemes
def test_ruled_out_tokens_give_no_nan(scheme):
    policy, anchor = random_logits(2, torch.float32)
    policy[..., 6], anchor[..., 5:] = -INF, -INF  # 6 is ruled out by both, 5 by the anchor
    policy.requires_grad_(), anchor.requires_grad_()
    targets_BT = TARGETS_BT % 5
    log_probs, entropy = mixture_log_probs([policy, anchor], [0.5, 0.5], targets_BT, scheme)
    (log_probs.sum() + entropy.sum()).backward()
    for tensor in (log_probs, entropy, policy.grad, anchor.grad):
        assert torch.isfinite(tensor).all()
    without = mixture_log_probs([z.detach()[..., :5] for z in (policy, anchor)], [0.5, 0.5], targets_BT)
    if scheme == "logit":
        torch.testing.assert_close((log_probs.detach(), entropy.detach()), without)


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, B + 1])
@pytest.mark.parametrize("chunk_elements", [1, 1 << 26])
def test_rows_of_weights_for_another_batch_are_rejected(monkeypatch, rows, chunk_elements):
    monkeypatch.setattr(log_probs_module, "_CHUNK_ELEMENTS", chunk_elements)
    with pytest.raises(ValueError, match=f"weights have {rows} rows for a batch of {B} sequences"):
        mixture_log_probs(random_logits(), [[0.5, 0.5]] * rows, TARGETS_BT)


def test_invalid_weights_are_rejected():
    with pytest.raises(ValueError, match="for 2 members"):
        mixture_log_probs(random_logits(), [0.2, 0.3, 0.5], TARGETS_BT)
    with pytest.raises(ValueError, match="scheme 'prob' needs weights >= 0 that sum to 1"):
        mixture_log_probs(random_logits(), [2.0, -1.0], TARGETS_BT, "prob")
