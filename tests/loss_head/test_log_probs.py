"""`fused_log_probs` compared with the plain computation from whole logits, in values and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from logitmix.loss_head import fused_log_probs, linear_pass, matmul
from logitmix.mixture.head import Head
from logitmix.mixture.mixing import SCHEMES
from tests.helpers.loss_head import (
    N,
    V,
    assert_agree,
    both_schemes,
    known,
    leaves,
    random_problem,
)


@both_schemes
@pytest.mark.parametrize("coefficients", [None, known()], ids=["recomputed", "in the forward pass"])
@pytest.mark.parametrize("weights", [[0.7, 0.3], [0.2, 0.5, 0.3], [1.0]], ids=str)
@pytest.mark.parametrize(
    "features",
    [{}, {"bias": True}, {"scale": 0.3}, {"softcap": 2.0}, {"bias": True, "scale": 0.5, "softcap": 1.5},
     {"rows": (0, 3, 1)}, {"rows": (2, 3, 1), "bias": True}],
    ids=str,
)  # fmt: skip
def test_matches_the_plain_computation(scheme, weights, features, coefficients):
    problem = random_problem(len(weights), **features)
    assert_agree(
        problem, weights, scheme=scheme, temperature=0.8, coefficients=coefficients, chunk=3, tile=4, vocab_size=V
    )


@settings(max_examples=60, deadline=None)
@given(
    scheme=st.sampled_from(SCHEMES),
    tokens=st.integers(1, 9),
    vocab=st.integers(1, 13),
    chunk=st.integers(1, 10),
    tile=st.integers(1, 15),
    temperature=st.floats(0.3, 3.0),
    alpha=st.floats(0.0, 0.99),
    softcap=st.sampled_from([None, 3.0]),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    is_known=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_and_chunking(
    scheme, tokens, vocab, chunk, tile, temperature, alpha, softcap, bias, dtype, is_known, seed
):
    problem = random_problem(2, tokens=tokens, vocab=vocab, bias=bias, softcap=softcap, dtype=dtype, seed=seed)
    assert_agree(
        problem, [1 - alpha, alpha], 1e-9 if dtype == torch.float64 else 2e-4, scheme=scheme, temperature=temperature,
        coefficients=known(tokens) if is_known else None, chunk=chunk, tile=tile,
    )  # fmt: skip


@pytest.mark.parametrize("chunk", range(1, N + 1))
@pytest.mark.parametrize("tile", [1, 2, 5, V])
def test_chunks_change_nothing(chunk, tile):
    assert_agree(random_problem(), [0.4, 0.6], chunk=chunk, tile=tile, coefficients=known())


@both_schemes
@pytest.mark.parametrize("coefficients", [None, known()], ids=["unknown", "known"])
def test_a_loss_with_gradients_through_the_entropy(scheme, coefficients):
    assert_agree(
        random_problem(bias=True), [0.4, 0.6], of_entropy=0.3, scheme=scheme, coefficients=coefficients, chunk=3
    )


@both_schemes
def test_one_row_of_weights_per_token(scheme):
    weights = [[1 - 0.15 * i, 0.15 * i] for i in range(N)]
    assert_agree(random_problem(bias=True), weights, scheme=scheme, chunk=2, tile=3, coefficients=known())


def test_negative_weights():
    assert_agree(random_problem(3), [1.0, 0.7, -0.7], chunk=2, tile=3, coefficients=known())


@both_schemes
def test_gradcheck(scheme):
    hidden, heads, targets = random_problem(2, tokens=3, vocab=4, bias=True)
    tensors = leaves(hidden, heads)

    def scores(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        heads = [Head(tensors[2], tensors[4]), Head(tensors[3], tensors[5])]
        return fused_log_probs(tensors[:2], heads, [0.3, 0.7], targets, scheme, 0.8, chunk=2, tile=3)

    assert torch.autograd.gradcheck(scores, tensors)
    # with frozen heads the gradient is computed in the forward pass
    assert torch.autograd.gradcheck(lambda *h: scores(*h, *(x.detach() for x in tensors[2:]))[0], tensors[:2])


def test_without_onednn_the_result_is_the_same():
    with torch.backends.mkldnn.flags(enabled=False):
        assert_agree(random_problem(bias=True, dtype=torch.float32), [0.4, 0.6], 2e-4, chunk=3, tile=4)


@both_schemes
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_members_that_share_a_head(scheme, trained, bias):
    hidden, heads, targets = random_problem(1, bias=bias)
    head = heads[0]
    for x in (head.weight, head.bias):
        if x is not None:
            x.requires_grad_(trained)
    hidden = [hidden[0], (hidden[0].detach() + 1).requires_grad_()]
    assert_agree((hidden, [head, head], targets), [0.3, 0.7], scheme=scheme, coefficients=known(), chunk=3, tile=4)


def test_members_that_share_a_head_share_its_products(monkeypatch):
    products = []

    def multiply(a, b, *args):
        products.append((tuple(a.shape), tuple(b.shape)))
        return matmul.multiply(a, b, *args)

    def add_product(out, a, b, *args):
        products.append((tuple(a.shape), tuple(b.shape)))
        matmul.add_product(out, a, b, *args)

    monkeypatch.setattr(linear_pass, "multiply", multiply)
    monkeypatch.setattr(linear_pass, "add_product", add_product)
    hidden, heads, targets = random_problem(1)
    head = Head(heads[0].weight.detach())
    fused_log_probs([hidden[0], hidden[0].detach()], [head, head], [0.3, 0.7], targets)
    assert products == [((N, 5), (5, V)), ((N, V), (V, 5))]


def test_an_empty_batch_of_tokens():
    hidden, heads, targets = random_problem(2, tokens=0)
    log_probs, entropy = fused_log_probs(hidden, heads, [0.5, 0.5], targets)
    assert log_probs.shape == entropy.shape == (0,)
    log_probs.sum().backward()
    assert all(h.grad.shape == h.shape for h in hidden)


def test_a_member_of_weight_0_is_ignored():
    hidden, heads, targets = random_problem(2)
    expected = fused_log_probs(hidden[:1], heads[:1], [1.0], targets)
    broken = [hidden[0], torch.full_like(hidden[1], torch.nan)]
    torch.testing.assert_close(fused_log_probs(broken, heads, [1.0, 0.0], targets), expected)


def test_all_weights_0_is_the_uniform_distribution():
    hidden, heads, targets = random_problem(2)
    log_probs, entropy = fused_log_probs(hidden, heads, [0.0, 0.0], targets)
    uniform = torch.full((N,), V, dtype=torch.float64).log()
    torch.testing.assert_close((log_probs, entropy), (-uniform, uniform))


@pytest.mark.parametrize("target", [-1, V, V + 2])
def test_a_target_outside_the_vocabulary_is_rejected(target):
    hidden, heads, targets = random_problem(2, rows=(4, 0, 0))
    targets[3] = target
    with pytest.raises(
        ValueError, match=rf"target {target} \(token 3\) is outside the members' shared vocabulary of {V} tokens"
    ):
        fused_log_probs(hidden, heads, [0.5, 0.5], targets)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_the_error_for_hidden_states_that_are_not_finite_names_them(value):
    hidden, heads, targets = random_problem(2)
    with torch.no_grad():
        hidden[1][4, 2] = value
    with pytest.raises(ValueError, match="hidden states of member 1 are not finite at token 4 of 7"):
        fused_log_probs(hidden, heads, [0.5, 0.5], targets)


def test_invalid_weights_shapes_and_options_are_rejected():
    hidden, heads, targets = random_problem(2, rows=(3, 0, 0))
    with pytest.raises(ValueError, match="for 2 members"):
        fused_log_probs(hidden, heads, [0.2, 0.3, 0.5], targets)
    with pytest.raises(ValueError, match="scheme 'prob' needs weights >= 0 that sum to 1"):
        fused_log_probs(hidden, heads, [2.0, -1.0], targets, "prob")
    with pytest.raises(
        ValueError, match=f"vocab_size is {V + 1}; it must be between 1 and {V}, the rows of the smallest head"
    ):
        fused_log_probs(hidden, heads, [0.5, 0.5], targets, vocab_size=V + 1)
    with pytest.raises(ValueError, match="temperature is 0; it must be above 0"):
        fused_log_probs(hidden, heads, [0.5, 0.5], targets, temperature=0)
    with pytest.raises(ValueError, match=r"of member 0 have shape \[7, 3\]; 7 targets and a head of width 5 need"):
        fused_log_probs(hidden[::-1], heads, [0.5, 0.5], targets)
    with pytest.raises(ValueError, match="diagnostics need the logits of every member, so no weight may be 0"):
        fused_log_probs(hidden, heads, [1.0, 0.0], targets, diagnostics=[])
    with pytest.raises(ValueError, match="hidden states of 1 members but 2 heads"):
        fused_log_probs(hidden[:1], heads, [1.0], targets)
