"""`mix_logits` compared with naive float64 formulas, limits, and the variational characterisation (eq. 10).

Shape legend: K members, B batch, T time, V vocabulary.
"""

from functools import partial

import pytest
import torch
from torch import Tensor

from logitmix.mixture.mixing import SCHEMES, alpha_to_weights, mix_logits
from tests.helpers.random_logits import draw_logits, naive_probs

INF = torch.inf
B, T, V = 3, 4, 7
random_logits = partial(draw_logits, (B, T, V))
both_schemes = pytest.mark.parametrize("scheme", SCHEMES)


# --- values -----------------------------------------------------------------------------------------------------


@both_schemes
@pytest.mark.parametrize("weights", [[0.7, 0.3], [0.5, 0.5], [0.0, 1.0], [0.2, 0.5, 0.3], [0.1, 0.0, 0.9], [0.25] * 4])
def test_matches_the_definition(scheme, weights):
    logits = random_logits(len(weights))
    mixed = mix_logits(logits, weights, scheme)
    assert mixed.dtype == torch.float64
    torch.testing.assert_close(mixed.softmax(-1), naive_probs(logits, weights, scheme), rtol=1e-12, atol=1e-14)


def test_logit_is_the_weighted_sum_of_the_logits():
    policy, anchor = random_logits()
    torch.testing.assert_close(mix_logits([policy, anchor], [0.7, 0.3]), 0.7 * policy + 0.3 * anchor)


def test_prob_is_normalised():
    mixed = mix_logits(random_logits(3), [0.2, 0.5, 0.3], "prob")
    torch.testing.assert_close(mixed.exp().sum(-1), torch.ones(B, T, dtype=torch.float64))


@both_schemes
@pytest.mark.parametrize("shape", [(B, V), (B, T, V), (B, 2, T, V)])
def test_any_axes_between_batch_and_vocabulary(scheme, shape):
    logits = [torch.randn(shape, dtype=torch.float64) for _ in range(2)]
    for weights in ([0.4, 0.6], [[0.4, 0.6], [1.0, 0.0], [0.9, 0.1]]):
        mixed = mix_logits(logits, weights, scheme)
        assert mixed.shape == shape
        for b in range(B):
            row = weights if isinstance(weights[0], float) else weights[b]
            expected = naive_probs([z[b] for z in logits], row, scheme)
            torch.testing.assert_close(mixed[b].softmax(-1), expected)


@both_schemes
def test_alpha_0_is_the_policy_and_alpha_1_the_anchor(scheme):
    members = random_logits(dtype=torch.float32)
    for alpha, member in enumerate(members):
        mixed = mix_logits(members, alpha_to_weights(alpha), scheme)
        expected = member if scheme == "logit" else member.log_softmax(-1)
        assert torch.equal(mixed, expected)
        assert mixed.data_ptr() != member.data_ptr(), "writing into the mixture must not change the member"


@both_schemes
def test_alpha_near_0_and_1_approaches_one_member(scheme):
    members = random_logits()
    for alpha, member in ((1e-9, members[0]), (1 - 1e-9, members[1])):
        mixed = mix_logits(members, alpha_to_weights(alpha), scheme)
        torch.testing.assert_close(mixed.softmax(-1), member.softmax(-1), atol=1e-7, rtol=1e-6)


@both_schemes
@pytest.mark.parametrize("weights", [[0.3, 0.7], [0.2, 0.3, 0.5]])
def test_identical_members_are_a_fixed_point(scheme, weights):
    z = random_logits(1)[0]
    mixed = mix_logits([z] * len(weights), weights, scheme)
    torch.testing.assert_close(mixed.softmax(-1), z.softmax(-1), rtol=1e-13, atol=1e-15)


@both_schemes
def test_rows_of_weights_match_each_row_alone(scheme):
    logits = random_logits(3, torch.float32)
    weights = torch.tensor([[0.2, 0.3, 0.5], [0.0, 1.0, 0.0], [0.6, 0.0, 0.4]], dtype=torch.float64)
    mixed = mix_logits(logits, weights, scheme)
    for b in range(B):
        alone = mix_logits([z[b : b + 1] for z in logits], weights[b], scheme)
        torch.testing.assert_close(mixed[b : b + 1], alone, rtol=1e-6, atol=1e-6)


@both_schemes
def test_equal_rows_of_weights_match_one_row(scheme):
    logits = random_logits(dtype=torch.float32)
    by_rows = mix_logits(logits, alpha_to_weights([0.3] * B), scheme)
    torch.testing.assert_close(by_rows, mix_logits(logits, alpha_to_weights(0.3), scheme), rtol=1e-6, atol=1e-6)


# --- eq. 10: the mixture as the closest distribution to its members ----------------------------------------------


def kl(p_V: Tensor, q_V: Tensor) -> Tensor:
    return (p_V * (p_V.log() - q_V.log())).sum(-1)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.8])
@both_schemes
def test_the_mixture_is_the_argmin_of_weighted_kl(scheme, alpha):
    """logit: argmin_p (1-α) KL(p‖policy) + α KL(p‖anchor), eq. 10; prob: the same with the divergences reversed."""
    generator = torch.Generator().manual_seed(1)
    members = [torch.randn(V, generator=generator, dtype=torch.float64) for _ in range(2)]
    policy_V, anchor_V = (z.softmax(-1) for z in members)

    def objective(p_V: Tensor) -> Tensor:
        if scheme == "logit":
            return (1 - alpha) * kl(p_V, policy_V) + alpha * kl(p_V, anchor_V)
        return (1 - alpha) * kl(policy_V, p_V) + alpha * kl(anchor_V, p_V)

    best_V = mix_logits(members, alpha_to_weights(alpha), scheme).softmax(-1)
    for scale in (1e-3, 1e-2, 0.1, 1.0):
        noise_NV = scale * torch.randn(200, V, generator=generator, dtype=torch.float64)
        perturbed_NV = (best_V.log() + noise_NV).softmax(-1)
        assert (objective(perturbed_NV) > objective(best_V)).all()


def test_the_minimum_of_eq_10_is_minus_the_log_normaliser():
    alpha = 0.3
    policy_V, anchor_V = (z[0, 0].softmax(-1) for z in random_logits())
    mixture_V = mix_logits([policy_V.log(), anchor_V.log()], alpha_to_weights(alpha)).softmax(-1)
    objective = (1 - alpha) * kl(mixture_V, policy_V) + alpha * kl(mixture_V, anchor_V)
    torch.testing.assert_close(objective, -(policy_V ** (1 - alpha) * anchor_V**alpha).sum().log())


# --- any real weights of the scheme logit ---------------------------------------------------------------------------


def test_dexperts_proxy_tuning_and_contrastive_decoding():
    base, expert, amateur = random_logits(3)
    strength = 1.7
    dexperts = mix_logits([base, expert, amateur], [1.0, strength, -strength])
    torch.testing.assert_close(dexperts, base + strength * (expert - amateur))
    proxy = mix_logits([base, expert, amateur], [1, 1, -1])
    torch.testing.assert_close(proxy, base + expert - amateur)
    contrastive = mix_logits([expert.log_softmax(-1), amateur.log_softmax(-1)], [1.0, -1.0])
    torch.testing.assert_close(contrastive, expert.log_softmax(-1) - amateur.log_softmax(-1))


def test_alpha_outside_0_and_1_extrapolates():
    policy, anchor = random_logits()
    torch.testing.assert_close(mix_logits([policy, anchor], alpha_to_weights(1.5)), anchor + 0.5 * (anchor - policy))


@pytest.mark.parametrize("weights", [[2.0, -1.0], [[2.0, -1.0]]])
def test_a_ruled_out_token_stays_so_under_negative_weights(weights):
    expert = torch.tensor([[0.0, 1.0, -INF, -INF]], requires_grad=True)
    amateur = torch.tensor([[1.0, 0.0, -INF, 0.0]], requires_grad=True)
    mixed = mix_logits([expert, amateur], weights)
    assert torch.equal(mixed, torch.tensor([[-1.0, 2.0, -INF, -INF]]))
    mixed.log_softmax(-1)[0, 1].backward()
    assert torch.isfinite(expert.grad).all()
    assert torch.isfinite(amateur.grad).all()


# --- gradients ---------------------------------------------------------------------------------------------------


@both_schemes
@pytest.mark.parametrize(
    "weights",
    [[0.3, 0.7], [1.0, 0.0], [0.2, 0.3, 0.5], [[0.3, 0.7], [1.0, 0.0], [0.5, 0.5]]],
    ids=["two", "end", "three", "rows"],
)
def test_gradcheck(scheme, weights):
    num_members = len(weights[0]) if isinstance(weights[0], list) else len(weights)
    logits = [z[:, :2, :5].clone().requires_grad_() for z in random_logits(num_members)]
    assert torch.autograd.gradcheck(lambda *zs: mix_logits(zs, weights, scheme), logits)


def test_gradcheck_negative_weights():
    logits = [z[:, :2, :5].clone().requires_grad_() for z in random_logits(3)]
    assert torch.autograd.gradcheck(lambda *zs: mix_logits(zs, [1.0, 2.0, -2.0]), logits)


def test_gradient_reaches_the_policy_through_1_minus_alpha():
    alpha = 0.3
    policy, anchor = random_logits()
    policy.requires_grad_()
    mixed = mix_logits([policy, anchor], alpha_to_weights(alpha))
    mixed.log_softmax(-1)[..., 0].sum().backward()
    one_hot = torch.eye(V, dtype=torch.float64)[0]
    torch.testing.assert_close(policy.grad, (1 - alpha) * (one_hot - mixed.detach().softmax(-1)))
