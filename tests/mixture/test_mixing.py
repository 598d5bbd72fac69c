"""`mix_logits` compared with naive float64 formulas, limits, and the variational characterisation (eq. 10).

Shape legend: K members, B batch, T time, V vocabulary.
"""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from logitmix.mixture.mixing import SCHEMES, alpha_to_weights, mix_logits, validate_weights

INF = torch.inf
B, T, V = 3, 4, 7
both_schemes = pytest.mark.parametrize("scheme", SCHEMES)


def naive_probs(logits: list[Tensor], weights: list[float], scheme: str) -> Tensor:
    """The mixture's distribution by definition: products of powers of the probabilities, or weighted sums."""
    probs = [z.double().exp() / z.double().exp().sum(-1, keepdim=True) for z in logits]
    if scheme == "prob":
        return sum(w * p for w, p in zip(weights, probs, strict=True))
    product = math.prod(p**w for w, p in zip(weights, probs, strict=True))
    return product / product.sum(-1, keepdim=True)


def random_logits(num_members: int = 2, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(3 * torch.randn(B, T, V, generator=generator, dtype=torch.float64)).to(dtype) for _ in range(num_members)]


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


# --- numerical limits -----------------------------------------------------------------------------------------------


def test_prob_does_not_underflow_where_the_other_member_has_mass():
    policy = torch.tensor([[0.0, -1e4, -1e4]])
    anchor = torch.tensor([[-1e4, 0.0, -1e4]])
    expected = torch.tensor([[math.log(0.75), math.log(0.25), -1e4]])
    for weights in ([0.75, 0.25], [[0.75, 0.25]]):
        torch.testing.assert_close(mix_logits([policy, anchor], weights, "prob"), expected)


def test_logit_at_large_logits_stays_finite():
    policy, anchor = torch.tensor([[0.0, -1e4, -1e4]]), torch.tensor([[-1e4, 0.0, -1e4]])
    log_probs = mix_logits([policy, anchor], [0.5, 0.5]).log_softmax(-1)
    torch.testing.assert_close(log_probs, torch.tensor([[-math.log(2), -math.log(2), -5000 - math.log(2)]]))


def test_prob_at_a_weight_too_small_for_float32_probabilities():
    policy, anchor = torch.tensor([[0.0, -200.0]]), torch.tensor([[-200.0, 0.0]])
    for weights in (alpha_to_weights(1e-30), alpha_to_weights([1e-30])):
        mixed = mix_logits([policy, anchor], weights, "prob")
        torch.testing.assert_close(mixed, torch.tensor([[0.0, math.log(1e-30)]]))


@both_schemes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_mixed_in_float32(scheme, dtype):
    logits = random_logits(2, dtype)
    mixed = mix_logits(logits, [0.35, 0.65], scheme)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, mix_logits([z.float() for z in logits], [0.35, 0.65], scheme))
    torch.testing.assert_close(
        mixed.double().softmax(-1), naive_probs(logits, [0.35, 0.65], scheme), rtol=1e-5, atol=1e-7
    )


def test_one_float64_member_makes_the_mixture_float64():
    policy, anchor = random_logits()
    assert mix_logits([policy.float(), anchor], [0.5, 0.5]).dtype == torch.float64


RULED_OUT = [
    # policy's logits, anchor's logits, probabilities at alpha = 1/2 (logit), (prob)
    ([0.0, 0.0, -INF], [0.0, 0.0, 0.0], [1 / 2, 1 / 2, 0.0], [5 / 12, 5 / 12, 1 / 6]),
    ([0.0, 0.0, 0.0], [-INF, 0.0, 0.0], [0.0, 1 / 2, 1 / 2], [1 / 6, 5 / 12, 5 / 12]),
    ([0.0, 0.0, -INF], [0.0, 0.0, -INF], [1 / 2, 1 / 2, 0.0], [1 / 2, 1 / 2, 0.0]),
    ([0.0, 0.0, -INF], [0.0, -INF, -INF], [1.0, 0.0, 0.0], [3 / 4, 1 / 4, 0.0]),
]


@both_schemes
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize(("policy", "anchor", "by_logit", "by_prob"), RULED_OUT)
def test_tokens_ruled_out_by_one_member_or_both(policy, anchor, by_logit, by_prob, scheme, by_row):
    members = [torch.tensor([z], dtype=torch.float64, requires_grad=True) for z in (policy, anchor)]
    weights = alpha_to_weights([0.5] if by_row else 0.5)
    log_probs = mix_logits(members, weights, scheme).log_softmax(-1)
    expected = torch.tensor([by_logit if scheme == "logit" else by_prob], dtype=torch.float64)
    torch.testing.assert_close(log_probs.exp(), expected)

    log_probs[0, 0 if expected[0, 0] > 0 else 1].backward()
    for member in members:
        assert torch.isfinite(member.grad).all()
        assert (member.grad[torch.isneginf(member)] == 0).all()


@both_schemes
@pytest.mark.parametrize("bad", [INF, -INF, torch.nan])
def test_a_member_of_weight_0_is_ignored(scheme, bad):
    policy, anchor = random_logits(dtype=torch.float32)
    anchor[0] = bad
    members = [policy.requires_grad_(), anchor.requires_grad_()]

    mixed = mix_logits([members[0][:1], members[1][:1]], [1.0, 0.0], scheme)  # weight 0 for the whole batch
    torch.testing.assert_close(mixed.softmax(-1), policy[:1].softmax(-1))

    mixed = mix_logits(members, [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]], scheme)  # weight 0 in the broken row
    torch.testing.assert_close(mixed[0].softmax(-1), policy[0].softmax(-1))
    torch.testing.assert_close(mixed[2].softmax(-1), anchor[2].softmax(-1))
    mixed.log_softmax(-1)[..., 0].sum().backward()
    assert torch.isfinite(policy.grad).all()
    assert torch.isfinite(anchor.grad).all()
    assert (anchor.grad[0] == 0).all()
    assert (policy.grad[2] == 0).all()
    assert (policy.grad[:2] != 0).any(-1).all()


@both_schemes
@pytest.mark.parametrize("bad", [INF, -INF, torch.nan])
@pytest.mark.parametrize("shape", [(3, V), (3, T, V)])
def test_rows_of_weight_0_without_gradients(scheme, bad, shape):
    """As in decoding: the values match those with gradients, and the members' logits are not modified."""
    policy, anchor = torch.randn(2, *shape)
    policy[2], anchor[0], anchor[1, ..., 0], policy[1, ..., 0] = bad, bad, -INF, -INF
    before = [policy.clone(), anchor.clone()]
    weights = [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]
    mixed = mix_logits([policy, anchor], weights, scheme)
    for member, copy in zip((policy, anchor), before, strict=True):
        torch.testing.assert_close(member, copy, rtol=0, atol=0, equal_nan=True)
    with_gradients = mix_logits([policy.requires_grad_(), anchor.requires_grad_()], weights, scheme)
    torch.testing.assert_close(mixed, with_gradients.detach(), rtol=0, atol=0)
    torch.testing.assert_close(mixed[0].softmax(-1), policy[0].softmax(-1).detach())
    torch.testing.assert_close(mixed[2].softmax(-1), anchor[2].softmax(-1).detach())
    assert (mixed[1].softmax(-1)[..., 0] == 0).all()


@both_schemes
def test_a_weight_that_is_0_in_float32_is_ignored(scheme):
    policy, anchor = random_logits(dtype=torch.float32)[:2]
    anchor[0] = -INF
    weights = [[1.0, 1e-50]] + [[0.5, 0.5]] * (B - 1)
    mixed = mix_logits([policy, anchor], weights, scheme)
    torch.testing.assert_close(mixed[0].softmax(-1), policy[0].softmax(-1))


def test_all_weights_0_is_the_uniform_distribution():
    logits = random_logits(dtype=torch.bfloat16)
    for weights in ([0.0, 0.0], [[0.0, 0.0]] * B):
        mixed = mix_logits(logits, weights)
        assert mixed.dtype == torch.float32
        assert torch.equal(mixed, torch.zeros(B, T, V))


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


# --- properties --------------------------------------------------------------------------------------------------

finite = st.floats(-30, 30, allow_nan=False, width=32)
property_test = partial(settings, deadline=None, max_examples=60, derandomize=True)()


@st.composite
def mixtures(draw, positive: bool):
    """K members `[1, V]` and K weights: a distribution over the members if `positive`, else any real numbers."""
    num_members, vocabulary = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    row = st.lists(finite, min_size=vocabulary, max_size=vocabulary)
    logits = [torch.tensor([draw(row)], dtype=torch.float64) for _ in range(num_members)]
    lowest = 0.0 if positive else -2.0
    raw = draw(st.lists(st.floats(lowest, 2.0), min_size=num_members, max_size=num_members))
    if positive and sum(raw) < 0.01:
        raw[0] = 1.0
    weights = torch.tensor(raw, dtype=torch.float64)
    return logits, weights / weights.sum() if positive else weights


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@property_test
@given(mixtures(positive=True), st.sampled_from(SCHEMES), st.lists(finite, min_size=4, max_size=4))
def test_a_constant_added_to_a_members_logits_changes_nothing(mixture, scheme, constants):
    logits, weights = mixture
    shifted = [z + c for z, c in zip(logits, constants, strict=False)]
    close(mix_logits(shifted, weights, scheme).softmax(-1), mix_logits(logits, weights, scheme).softmax(-1))


@property_test
@given(mixtures(positive=False), st.lists(finite, min_size=4, max_size=4))
def test_translation_invariance_holds_for_any_real_weights(mixture, constants):
    logits, weights = mixture
    shifted = [z + c for z, c in zip(logits, constants, strict=False)]
    close(mix_logits(shifted, weights).softmax(-1), mix_logits(logits, weights).softmax(-1))


@property_test
@given(mixtures(positive=True), st.sampled_from(SCHEMES), st.randoms(use_true_random=False))
def test_the_order_of_the_members_does_not_matter(mixture, scheme, random):
    logits, weights = mixture
    order = list(range(len(logits)))
    random.shuffle(order)
    permuted = mix_logits([logits[k] for k in order], weights[order], scheme)
    close(permuted, mix_logits(logits, weights, scheme))


@property_test
@given(mixtures(positive=True))
def test_prob_lies_between_its_members(mixture):
    logits, weights = mixture
    probs_K1V = torch.stack([z.softmax(-1) for z in logits])
    mixed = mix_logits(logits, weights, "prob").exp()
    assert (mixed <= probs_K1V.amax(0) + 1e-9).all()
    assert (mixed >= probs_K1V.amin(0) - 1e-9).all()


@property_test
@given(mixtures(positive=True))
def test_logit_lies_between_its_members_up_to_the_normaliser(mixture):
    """Hölder: the geometric mean's normaliser is at most 1, so its log-probabilities are at least the smaller ones."""
    logits, weights = mixture
    log_probs_K1V = torch.stack([z.log_softmax(-1) for z in logits])
    mixed = mix_logits(logits, weights).log_softmax(-1)
    assert (mixed >= log_probs_K1V.amin(0) - 1e-9).all()


@property_test
@given(mixtures(positive=True), st.sampled_from(SCHEMES))
def test_a_member_split_in_two_is_the_same_mixture(mixture, scheme):
    logits, weights = mixture
    halves = torch.cat([weights[:1] / 2, weights[:1] / 2, weights[1:]])
    close(mix_logits([logits[0], *logits], halves, scheme), mix_logits(logits, weights, scheme))


# --- weights --------------------------------------------------------------------------------------------------------


def test_alpha_to_weights():
    assert alpha_to_weights(0.25).tolist() == [0.75, 0.25]
    assert alpha_to_weights([0.0, 1.0, 0.5]).tolist() == [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]
    assert alpha_to_weights(torch.tensor([0.5])).shape == (1, 2)
    assert alpha_to_weights(0.5).dtype == torch.float64


def test_alpha_with_too_many_axes_is_rejected():
    with pytest.raises(ValueError, match=r"alpha has shape \[2, 1\]; pass one number, or one number for each"):
        alpha_to_weights(torch.zeros(2, 1))


@pytest.mark.parametrize(
    ("weights", "num_members", "scheme", "message"),
    [
        ([0.5, 0.5], 2, "mean", r"scheme is 'mean'; it must be one of 'logit', 'prob'"),
        ([0.5, 0.5], 3, "logit", r"weights have shape \[2\] for 3 members; pass 3 numbers, or one row of 3"),
        ([[0.5, 0.5]], 3, "logit", r"weights have shape \[1, 2\] for 3 members"),
        (0.5, 2, "logit", r"weights have shape \[\] for 2 members"),
        (torch.zeros(1, 1, 2), 2, "logit", r"weights have shape \[1, 1, 2\] for 2 members"),
        ([0.5, math.nan], 2, "logit", r"weights are not finite: \[0.5, nan\]"),
        ([math.inf, -math.inf], 2, "logit", r"weights are not finite: \[inf, -inf\]"),
        ([0.5, math.nan], 2, "prob", r"weights are not finite"),
        ([1.5, -0.5], 2, "prob", r"needs weights >= 0 that sum to 1 \(alpha within \[0, 1\]\), got \[1.5, -0.5\]"),
        ([0.5, 0.4], 2, "prob", r"got \[0.5, 0.4\]; scheme 'logit' takes any real weights"),
        ([[0.5, 0.5], [0.6, 0.5]], 2, "prob", r"needs weights >= 0 that sum to 1"),
    ],
)
def test_invalid_weights_are_rejected(weights, num_members, scheme, message):
    with pytest.raises(ValueError, match=message):
        validate_weights(weights, num_members, scheme)
    with pytest.raises(ValueError, match=message):
        mix_logits([torch.zeros(2, V)] * num_members, weights, scheme)


@both_schemes
@pytest.mark.parametrize("rows", [1, 3])
def test_rows_of_weights_for_another_batch_are_rejected(scheme, rows):
    with pytest.raises(ValueError, match=f"weights have {rows} rows for a batch of 2 sequences"):
        mix_logits([torch.zeros(2, V)] * 2, [[0.5, 0.5]] * rows, scheme)


def test_valid_weights():
    assert validate_weights([1, 2, -2], 3, "logit").tolist() == [1, 2, -2]
    assert validate_weights(torch.tensor([1 / 3] * 3), 3, "prob").shape == (
        3,
    )  # float32 thirds do not sum to 1 exactly
    assert validate_weights([[0.5, 0.5]] * 4, 2, "prob", batch=4).shape == (4, 2)
