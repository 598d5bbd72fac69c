"""The fused loss head compared with the plain computation from whole logits, in values and gradients.

Shape legend: K members, N tokens, V vocabulary, D width.
"""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from logitmix.loss_head import clipped_coefficients, fused_log_probs, linear_pass, log_probs, matmul
from logitmix.mixture.diagnostics import mixture_diagnostics
from logitmix.mixture.head import Head
from logitmix.mixture.log_probs import log_probs_and_entropy
from logitmix.mixture.mixing import SCHEMES, mix_logits

N, V, WIDTHS = 7, 11, (5, 3, 4)
both_schemes = pytest.mark.parametrize("scheme", SCHEMES)


def random_problem(
    num_members: int = 2,
    *,
    tokens: int = N,
    vocab: int = V,
    rows: tuple[int, ...] = (0, 0, 0),
    bias: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[list[Tensor], list[Head], Tensor]:
    """Hidden states, heads of different widths with `rows` of padding beyond the vocabulary, and targets."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    hidden = [draw(tokens, WIDTHS[k]) for k in range(num_members)]
    heads = [
        Head(draw(vocab + rows[k], WIDTHS[k]), draw(vocab + rows[k]) if bias else None, scale, softcap)
        for k in range(num_members)
    ]
    return hidden, heads, torch.randint(vocab, (tokens,), generator=generator)


def leaves(hidden: list[Tensor], heads: list[Head]) -> list[Tensor]:
    tensors = [*hidden, *(head.weight for head in heads), *(head.bias for head in heads if head.bias is not None)]
    return [x for x in dict.fromkeys(tensors) if x.requires_grad]


def plain(hidden, heads, weights, targets, scheme="logit", temperature=1.0, vocab_size=None):
    """The reference that `fused_log_probs` documents, in float64."""
    logits = [
        Head(head.weight.double(), None if head.bias is None else head.bias.double(), head.scale, head.softcap).logits(
            h.double()
        )
        for h, head in zip(hidden, heads, strict=True)
    ]
    vocab_size = vocab_size or min(z.shape[-1] for z in logits)
    mixed = mix_logits([z[..., :vocab_size] for z in logits], weights, scheme)
    return log_probs_and_entropy(mixed, targets, temperature)


def upstream(tokens: int = N) -> Tensor:
    return torch.linspace(-1.5, 2.0, tokens, dtype=torch.float64)


def gradients(scores: tuple[Tensor, Tensor], tensors: list[Tensor], of_entropy: float = 0.0) -> list[Tensor]:
    log_probs, entropy = scores
    loss = (log_probs * upstream(len(log_probs)).to(log_probs)).sum()
    if of_entropy:
        loss = loss + of_entropy * (entropy * upstream(len(log_probs)).to(log_probs).flip(0)).sum()
    return list(torch.autograd.grad(loss, tensors, materialize_grads=True))


def known(tokens: int = N):
    return lambda log_probs, where: upstream(tokens).to(log_probs)[where]


def assert_agree(problem, weights, tolerance: float = 1e-10, of_entropy: float = 0.0, **kwargs) -> None:
    hidden, heads, targets = problem
    options = {key: value for key, value in kwargs.items() if key not in ("chunk", "tile", "coefficients")}
    expected = plain(hidden, heads, weights, targets, **options)
    actual = fused_log_probs(hidden, heads, weights, targets, **kwargs)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=tolerance, atol=tolerance)
    tensors = leaves(hidden, heads)
    for a, e in zip(gradients(actual, tensors, of_entropy), gradients(expected, tensors, of_entropy), strict=True):
        torch.testing.assert_close(a.double(), e.double(), rtol=tolerance, atol=tolerance)


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


# --- which gradients, in how many passes ----------------------------------------------------------------------------


def passes(monkeypatch) -> list[tuple[bool, ...]]:
    """A list to which each pass over the vocabulary appends the gradients that it computes."""
    taken = []
    run = log_probs.run_passes

    def counted(inputs, tensors, needs_grad, *args):
        taken.append(tuple(needs_grad))
        return run(inputs, tensors, needs_grad, *args)

    monkeypatch.setattr(log_probs, "run_passes", counted)
    return taken


@both_schemes
@pytest.mark.parametrize("frozen_head", [True, False])
def test_a_frozen_anchor_gets_no_gradient(monkeypatch, scheme, frozen_head):
    taken = passes(monkeypatch)
    hidden, heads, targets = random_problem(2)
    for x in (hidden[1], heads[1].weight, *([heads[0].weight] if frozen_head else [])):
        x.requires_grad_(False)
    log_probs, _ = fused_log_probs(hidden, heads, [0.5, 0.5], targets, scheme, coefficients=known())
    gradients((log_probs, torch.zeros(())), leaves(hidden, heads))
    assert taken == [(True, False, not frozen_head, False, False, False)]


def test_coefficients_known_up_to_a_factor_need_one_pass(monkeypatch):
    taken = passes(monkeypatch)
    hidden, heads, targets = random_problem(2)
    tensors = leaves(hidden, heads)
    scores = fused_log_probs(hidden, heads, [0.5, 0.5], targets, coefficients=lambda _, where: 8 * upstream()[where])
    expected = gradients(plain(hidden, heads, [0.5, 0.5], targets), tensors)
    torch.testing.assert_close(gradients(scores, tensors), expected)
    assert len(taken) == 1


@pytest.mark.parametrize("wrong", [0.0, 1.0])
def test_wrong_coefficients_cost_a_second_pass(monkeypatch, wrong):
    taken = passes(monkeypatch)
    problem = random_problem(2)
    assert_agree(problem, [0.5, 0.5], coefficients=lambda log_probs, where: torch.full_like(log_probs, wrong))
    assert len(taken) == 2


def test_with_frozen_heads_any_loss_needs_one_pass(monkeypatch):
    taken = passes(monkeypatch)
    hidden, heads, targets = random_problem(2)
    for head in heads:
        head.weight.requires_grad_(False)
    log_probs, _ = fused_log_probs(hidden, heads, [0.5, 0.5], targets)
    of_a_sequence = torch.autograd.grad(log_probs.mean().exp(), hidden)
    expected = torch.autograd.grad(plain(hidden, heads, [0.5, 0.5], targets)[0].mean().exp(), hidden)
    torch.testing.assert_close(of_a_sequence, expected)
    assert len(taken) == 1


def test_a_second_backward_pass_gives_the_same_gradients():
    hidden, heads, targets = random_problem(2)
    tensors = leaves(hidden, heads)
    log_probs, _ = fused_log_probs(hidden, heads, [0.5, 0.5], targets, coefficients=known())
    first = torch.autograd.grad(log_probs, tensors, upstream(), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(log_probs, tensors, upstream()), first)


def test_no_graph_without_gradients(monkeypatch):
    taken = passes(monkeypatch)
    hidden, heads, targets = random_problem(2)
    with torch.no_grad():
        scores = fused_log_probs(hidden, heads, [0.5, 0.5], targets, coefficients=known())
    assert not any(score.requires_grad for score in scores)
    assert not any(taken[0])


# --- shared heads ---------------------------------------------------------------------------------------------------


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


# --- diagnostics -----------------------------------------------------------------------------------------------------


@both_schemes
@pytest.mark.parametrize("weights", [[0.7, 0.3], [0.2, 0.5, 0.3]], ids=str)
@pytest.mark.parametrize("features", [{}, {"bias": True, "scale": 0.4}, {"softcap": 2.0}], ids=str)
def test_diagnostics_match_those_of_whole_logits(scheme, weights, features):
    hidden, heads, targets = random_problem(len(weights), rows=(0, 2, 1), **features)
    logits = [head.logits(h)[:, :V] for h, head in zip(hidden, heads, strict=True)]
    expected = mixture_diagnostics(logits, mix_logits(logits, weights, scheme), 0.8)
    found = []
    scores = fused_log_probs(
        hidden, heads, weights, targets, scheme, 0.8, coefficients=known(), diagnostics=found, chunk=3, tile=4
    )
    for parts, e in zip(zip(*found, strict=True), expected, strict=True):
        torch.testing.assert_close(torch.cat(parts), e)
    tensors = leaves(hidden, heads)
    plain_scores = plain(hidden, heads, weights, targets, scheme, 0.8, V)
    torch.testing.assert_close(gradients(scores, tensors), gradients(plain_scores, tensors))


def test_recomputing_in_the_backward_pass_adds_no_diagnostics():
    hidden, heads, targets = random_problem(2)
    found = []
    scores = fused_log_probs(hidden, heads, [0.5, 0.5], targets, diagnostics=found)
    gradients(scores, leaves(hidden, heads))
    assert len(found) == 1


def test_diagnostics_of_members_that_share_a_head():
    hidden, heads, targets = random_problem(1)
    hidden = [hidden[0], (hidden[0].detach() + 1).requires_grad_()]
    heads = heads * 2
    found, alone = [], plain(hidden, heads, [0.3, 0.7], targets)
    scores = fused_log_probs(hidden, heads, [0.3, 0.7], targets, diagnostics=found, coefficients=known())
    logits = [head.logits(h) for h, head in zip(hidden, heads, strict=True)]
    torch.testing.assert_close(tuple(found[0]), tuple(mixture_diagnostics(logits, mix_logits(logits, [0.3, 0.7]))))
    torch.testing.assert_close(gradients(scores, leaves(hidden, heads)), gradients(alone, leaves(hidden, heads)))


# --- memory ----------------------------------------------------------------------------------------------------------


@both_schemes
@pytest.mark.parametrize("coefficients", [None, known(64)], ids=["recomputed", "in the forward pass"])
def test_no_tensor_has_the_size_of_all_logits(scheme, coefficients):
    tokens, vocab, chunk = 64, 50, 4
    hidden, heads, targets = random_problem(2, tokens=tokens, vocab=vocab)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        log_probs, _ = fused_log_probs(
            hidden, heads, [0.5, 0.5], targets, scheme, coefficients=coefficients, chunk=chunk
        )
        gradients((log_probs, torch.zeros(())), leaves(hidden, heads))
    assert largest <= max(tokens, vocab) * max(WIDTHS)  # the size of a gradient
    assert largest < tokens * vocab


# --- precision -------------------------------------------------------------------------------------------------------


@both_schemes
@pytest.mark.parametrize("seed", range(3))
def test_bfloat16_is_as_accurate_as_the_plain_computation(scheme, seed):
    tokens, vocab = 64, 300
    hidden, heads, targets = random_problem(2, tokens=tokens, vocab=vocab, dtype=torch.bfloat16, seed=seed)
    tensors = leaves(hidden, heads)
    truth = plain(hidden, heads, [0.5, 0.5], targets, scheme)
    logits = [head.logits(h) for h, head in zip(hidden, heads, strict=True)]
    in_bf16 = log_probs_and_entropy(mix_logits(logits, [0.5, 0.5], scheme), targets)
    found = fused_log_probs(hidden, heads, [0.5, 0.5], targets, scheme, coefficients=known(tokens))
    assert all(score.dtype == torch.float32 for score in found)
    true, fused, half = (
        [*(score.detach() for score in scores), *gradients(scores, tensors)] for scores in (truth, found, in_bf16)
    )
    for t, o, b in zip(true, fused, half, strict=True):
        assert (o.double() - t.double()).norm() <= 1.02 * (b.double() - t.double()).norm()


def test_a_token_of_probability_near_1_keeps_its_gradient():
    hidden = torch.ones(1, 1, requires_grad=True)
    head = Head(torch.tensor([[25.0], [0.0]]))
    log_probs, _ = fused_log_probs([hidden], [head], [1.0], torch.tensor([0]))
    log_probs.sum().backward()
    torch.testing.assert_close(log_probs.item(), -math.exp(-25), rtol=1e-5, atol=0)  # a plain log_softmax gives 0
    torch.testing.assert_close(hidden.grad.item(), 25 * math.exp(-25), rtol=1e-5, atol=0)


def test_large_logits_stay_finite():
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    head = Head(torch.tensor([[1.0], [0.5], [-1.0]]).requires_grad_())
    scores = fused_log_probs([hidden], [head], [1.0], torch.tensor([1, 1]), tile=1, coefficients=known(2))
    torch.testing.assert_close(scores[0].detach(), torch.tensor([-5e3, -1.5e4]))
    torch.testing.assert_close(scores[1].detach(), torch.zeros(2))
    assert all(torch.isfinite(g).all() for g in gradients(scores, [hidden, head.weight]))


def test_autocast_changes_nothing():
    hidden, heads, targets = random_problem(2, dtype=torch.float32)
    expected = fused_log_probs(hidden, heads, [0.5, 0.5], targets)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fused_log_probs(hidden, heads, [0.5, 0.5], targets), expected, rtol=0, atol=0)


# --- the coefficients of eq. 6 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilons", [(0.2, 0.2), (0.1, 0.4), (0.0, 0.3)])
@pytest.mark.parametrize("is_first_update", [True, False])
def test_coefficients_are_the_derivative_of_the_clipped_objective(epsilons, is_first_update):
    low, high = epsilons
    old, advantages = torch.tensor(
        list(product(torch.linspace(-1, 1, 41).tolist(), [-1.3, -0.2, 0.0, 0.7, 2.0])), dtype=torch.float64
    ).unbind(1)
    log_probs = (torch.zeros_like(old) - 0.013).requires_grad_()
    if is_first_update:
        old = log_probs.detach()
    ratio = (log_probs - old).exp()
    loss = -torch.min(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    (expected,) = torch.autograd.grad(loss.sum(), log_probs)
    actual = clipped_coefficients(log_probs.detach(), advantages, None if is_first_update else old, low, high)
    torch.testing.assert_close(actual, expected)


def test_an_off_policy_loss_needs_one_pass(monkeypatch):
    taken = passes(monkeypatch)
    hidden, heads, targets = random_problem(2)
    tensors = leaves(hidden, heads)
    advantages = upstream()
    old = plain(hidden, heads, [0.5, 0.5], targets)[0].detach() + torch.linspace(-0.5, 0.5, N, dtype=torch.float64)

    def loss(log_probs: Tensor) -> Tensor:
        ratio = (log_probs - old).exp()
        return -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()

    log_probs, _ = fused_log_probs(
        hidden, heads, [0.5, 0.5], targets, chunk=2,
        coefficients=lambda lp, where: clipped_coefficients(lp, advantages[where], old[where]),
    )  # fmt: skip
    expected = torch.autograd.grad(loss(plain(hidden, heads, [0.5, 0.5], targets)[0]), tensors)
    torch.testing.assert_close(torch.autograd.grad(loss(log_probs), tensors), expected)
    assert len(taken) == 1


# --- limits and errors ----------------------------------------------------------------------------------------------


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
