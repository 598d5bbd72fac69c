"""The fused distillation loss against the one from whole logits, and against TRL's."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from logitmix.loss_head import distillation
from logitmix.loss_head.distillation import fused_divergence
from logitmix.loss_head.divergence import token_divergence
from logitmix.mixture.head import Head
from logitmix.mixture.mixing import SCHEMES
from tests.helpers.distillation import (
    BETAS,
    assert_divergence_agrees,
    plain_divergence,
    random_distillation,
    student_leaves,
)
from tests.helpers.loss_head import N, V, both_schemes

betas = pytest.mark.parametrize("beta", BETAS)
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.4},
    "soft cap of the student": {"softcap": 1.5},
    "padding rows": {"rows": (3, 0, 5)},
}


@both_schemes
@betas
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("members", [1, 2, 3])
def test_it_is_the_divergence_of_whole_logits(scheme, beta, options, members):
    weights = {1: [1.0], 2: [0.3, 0.7], 3: [0.2, 0.5, 0.3]}[members]
    problem = random_distillation(members, **options)
    assert_divergence_agrees(problem, weights, scheme=scheme, beta=beta, temperature=0.7, chunk=3, tile=4)
    assert_divergence_agrees(problem, weights, scheme=scheme, beta=beta, uniform=True)


@betas
@pytest.mark.parametrize("weights", [[1.5, -0.5], [0.0, 1.0], [0.0, 0.0], [0.9, 0.4]])
def test_any_weights_of_the_scheme_logit(beta, weights):
    assert_divergence_agrees(random_distillation(), weights, beta=beta)


@both_schemes
@betas
def test_weights_of_each_token(scheme, beta):
    weights = torch.rand(N, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights[2] = 0.0
    assert_divergence_agrees(
        random_distillation(), torch.cat([1 - weights, weights], 1), scheme=scheme, beta=beta, chunk=2
    )


@betas
def test_members_with_a_soft_cap(beta):
    hidden, head, teacher_hidden, teacher_heads = random_distillation()
    capped = [Head(h.weight, softcap=0.8) for h in teacher_heads]
    assert_divergence_agrees((hidden, head, teacher_hidden, capped), [0.4, 0.6], beta=beta, chunk=2)


@both_schemes
@betas
@pytest.mark.parametrize("of_all_tokens", [True, False])
def test_weights_of_0_and_a_member_that_rules_out_a_token(scheme, beta, of_all_tokens):
    hidden, head, teacher_hidden, teacher_heads = random_distillation(bias=True)
    with torch.no_grad():
        teacher_heads[1].bias[2] = head.bias[2] = -math.inf
    weights = torch.tensor([[1.0, 0.0], [0.4, 0.6]], dtype=torch.float64).repeat(N, 1)[:N]
    weights = weights[0] if of_all_tokens else weights
    problem = (hidden, head, teacher_hidden, teacher_heads)
    assert_divergence_agrees(problem, weights, scheme=scheme, beta=max(beta, 0.2), chunk=3)


def test_a_negative_weight_keeps_out_what_its_member_rules_out():
    hidden, head, teacher_hidden, teacher_heads = random_distillation(bias=True)
    with torch.no_grad():
        for h in (head, *teacher_heads):
            h.bias[2] = -math.inf
    assert_divergence_agrees((hidden, head, teacher_hidden, teacher_heads), [1.5, -0.5])


@betas
def test_members_that_share_a_head(beta):
    hidden, head, teacher_hidden, teacher_heads = random_distillation()
    shared = (hidden, head, [teacher_hidden[0], teacher_hidden[0].flip(0)], [teacher_heads[0]] * 2)
    assert_divergence_agrees(shared, [0.4, 0.6], beta=beta)


@both_schemes
@betas
def test_gradcheck(scheme, beta):
    problem = random_distillation(bias=True, softcap=2.0)
    hidden, head, *teacher = problem

    def divergence(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        student = Head(weight, bias, 0.8, 2.0)
        return fused_divergence(hidden, student, *teacher, [0.3, 0.7], scheme, beta, 1.3, chunk=3, tile=4)[0]

    assert torch.autograd.gradcheck(divergence, (hidden, head.weight, head.bias))


def test_a_loss_that_is_no_mean_recomputes_the_chunks(monkeypatch):
    runs = []
    run = distillation._run
    monkeypatch.setattr(distillation, "_run", lambda *args: runs.append(len(args)) or run(*args))
    problem = random_distillation()
    fused_divergence(*problem, [0.5, 0.5])[0].mean().backward()
    assert len(runs) == 1
    (fused_divergence(*problem, [0.5, 0.5])[0] ** 2).sum().backward()
    assert len(runs) == 3


def test_with_a_frozen_head_any_loss_takes_one_pass(monkeypatch):
    runs = []
    run = distillation._run
    monkeypatch.setattr(distillation, "_run", lambda *args: runs.append(len(args)) or run(*args))
    problem = random_distillation()
    problem[1].weight.requires_grad_(False)
    assert_divergence_agrees(problem, [0.5, 0.5])
    assert len(runs) == 1


def test_a_second_backward_pass_gives_the_same_gradients():
    problem = random_distillation()
    loss = fused_divergence(*problem, [0.5, 0.5])[0].mean()
    first = torch.autograd.grad(loss, student_leaves(problem), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, student_leaves(problem)), first)


def test_the_teacher_and_the_entropy_get_no_gradient():
    hidden, head, teacher_hidden, teacher_heads = random_distillation()
    for x in (*teacher_hidden, *(h.weight for h in teacher_heads)):
        x.requires_grad_()
    divergence, entropy = fused_divergence(hidden, head, teacher_hidden, teacher_heads, [0.5, 0.5])
    assert not entropy.requires_grad
    divergence.sum().backward()
    assert all(x.grad is None for x in (*teacher_hidden, *(h.weight for h in teacher_heads)))


def test_no_graph_without_gradients():
    with torch.no_grad():
        assert not fused_divergence(*random_distillation(), [0.5, 0.5])[0].requires_grad


@both_schemes
@betas
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_is_computed_in_float32(scheme, beta, dtype):
    problem = random_distillation(dtype=dtype)
    assert_divergence_agrees(problem, [0.3, 0.7], 1e-5 if dtype == torch.float32 else 1e-2, scheme=scheme, beta=beta)
    divergence, _ = fused_divergence(*problem, [0.3, 0.7], scheme, beta)
    expected, _ = plain_divergence(problem, [0.3, 0.7], scheme, beta)
    torch.testing.assert_close(divergence.double(), expected, rtol=1e-5, atol=1e-5)


@betas
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_it_is_trls_divergence_for_a_teacher_of_one_model(beta, temperature):
    problem = random_distillation(1, bias=True, scale=0.7, dtype=torch.float32)
    hidden, head, (teacher_hidden,), (teacher_head,) = problem
    expected = ChunkedDivergenceFunction.apply(
        hidden, head.weight, head.bias, teacher_hidden, teacher_head.weight, teacher_head.bias, beta, temperature,
        head.scale, None, teacher_head.scale, None,
    )  # fmt: skip
    actual = fused_divergence(*problem, [1.0], beta=beta, temperature=temperature)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(x[0].mean(), student_leaves(problem)) for x in (actual, expected)]
    for a, e in zip(*grads, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)


@betas
def test_it_is_trls_divergence_of_the_members_side_by_side(beta):
    """For the scheme logit and linear heads, `[W_0 | W_1] [w_0 h_0; w_1 h_1]` are the mixture's logits."""
    problem = random_distillation(2, dtype=torch.float32)
    hidden, head, teacher_hidden, teacher_heads = problem
    weights = [0.3, 0.7]
    side_by_side = torch.cat([w * h for w, h in zip(weights, teacher_hidden, strict=True)], -1)
    heads = torch.cat([h.weight for h in teacher_heads], -1)
    expected = ChunkedDivergenceFunction.apply(hidden, head.weight, None, side_by_side, heads, None, beta)
    actual = fused_divergence(*problem, weights, beta=beta)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(x[0].mean(), student_leaves(problem)) for x in (actual, expected)]
    for a, e in zip(*grads, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)


@both_schemes
@betas
def test_tokens_that_both_rule_out_add_nothing(scheme, beta):
    hidden, head, teacher_hidden, teacher_heads = random_distillation(bias=True)
    out = [0, 4, 5, 6, 7, 10]  # all of a tile, too
    for h in (head, *teacher_heads):
        with torch.no_grad():
            h.bias[out] = -math.inf
    problem = (hidden, head, teacher_hidden, teacher_heads)
    assert_divergence_agrees(problem, [0.3, 0.7], scheme=scheme, beta=beta, tile=4)
    divergence, entropy = fused_divergence(*problem, [0.3, 0.7], scheme, beta)
    assert torch.isfinite(divergence).all()
    assert (entropy <= math.log(V - len(out)) + 1e-9).all()
    divergence.sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in student_leaves(problem))


@pytest.mark.parametrize(
    ("beta", "by", "is_infinite"),
    [(0.0, "student", True), (0.0, "teacher", False), (1.0, "teacher", True), (1.0, "student", False)]
    + [(0.4, who, False) for who in ("student", "teacher")],
)
def test_a_token_that_one_of_them_rules_out(beta, by, is_infinite):
    hidden, head, teacher_hidden, teacher_heads = random_distillation(bias=True)
    with torch.no_grad():
        (head if by == "student" else teacher_heads[0]).bias[3] = -math.inf
    problem = (hidden, head, teacher_hidden, teacher_heads)
    divergence, _ = fused_divergence(*problem, [0.3, 0.7], beta=beta)
    assert bool(torch.isposinf(divergence).all()) == is_infinite
    torch.testing.assert_close(divergence, plain_divergence(problem, [0.3, 0.7], beta=beta)[0])
    if not is_infinite:
        assert_divergence_agrees(problem, [0.3, 0.7], beta=beta)


@betas
def test_a_student_that_is_the_mixture_has_no_divergence(beta):
    hidden, head, *_ = random_distillation(dtype=torch.float32)
    divergence, _ = fused_divergence(hidden, head, [hidden], [head], [1.0], beta=beta)
    gradients = torch.autograd.grad(divergence.sum(), [hidden, head.weight])
    limit = 0.0 if beta in (0.0, 1.0) else 1e-6
    assert divergence.abs().max() <= limit
    assert all(g.abs().max() <= 10 * limit for g in gradients)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0.05, 20), st.sampled_from(SCHEMES), st.floats(0, 1))
def test_properties_of_a_divergence(seed, beta, temperature, scheme, alpha):
    problem = random_distillation()
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, problem[0].shape[1], generator=generator, dtype=torch.float64) * 5
    problem = (hidden.requires_grad_(), *problem[1:])
    divergence, entropy = fused_divergence(*problem, [1 - alpha, alpha], scheme, beta, temperature, chunk=2, tile=3)
    assert (divergence >= -1e-12).all()
    assert (entropy >= -1e-12).all()
    assert (entropy <= math.log(V) + 1e-12).all()
    if 0 < beta < 1:  # the entropy of which of the two distributions a token came from
        assert (divergence <= -(beta * math.log(beta) + (1 - beta) * math.log1p(-beta)) + 1e-12).all()
    (gradient,) = torch.autograd.grad(divergence.sum(), [problem[0]])
    expected, _ = plain_divergence(problem, [1 - alpha, alpha], scheme, beta, temperature)
    torch.testing.assert_close(divergence, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), [problem[0]])[0], rtol=1e-9, atol=1e-9)


@both_schemes
def test_no_tensor_has_the_size_of_all_logits(scheme):
    tokens, vocab = 64, 50
    problem = random_distillation(tokens=tokens, vocab=vocab)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        fused_divergence(*problem, [0.5, 0.5], scheme, chunk=4)[0].mean().backward()
    assert largest < tokens * vocab / 4


def test_a_batch_without_tokens_has_a_graph():
    hidden, head, teacher_hidden, teacher_heads = random_distillation(tokens=0)
    divergence, entropy = fused_divergence(hidden, head, teacher_hidden, teacher_heads, [0.5, 0.5])
    assert divergence.shape == entropy.shape == (0,)
    divergence.sum().backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 1.2}, "beta is 1.2; it must be between 0 (forward KL) and 1 (reverse KL)"),
        ({"beta": math.nan}, "beta is nan"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"vocab_size": V + 1}, f"vocab_size is {V + 1}; it must be between 1 and {V}"),
        ({"scheme": "prob", "weights": [1.5, -0.5]}, "scheme 'prob' needs weights >= 0"),
        ({"weights": [1.0]}, "weights have shape [1] for 2 members"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match="^" + message.replace("(", r"\(").replace(")", r"\)").replace("[", r"\[")):
        fused_divergence(*random_distillation(), **({"weights": [0.5, 0.5]} | options))


def test_hidden_states_of_another_width_are_refused():
    hidden, head, teacher_hidden, teacher_heads = random_distillation()
    with pytest.raises(ValueError, match="the student's hidden states have shape"):
        fused_divergence(hidden[:, 1:], head, teacher_hidden, teacher_heads, [0.5, 0.5])
    with pytest.raises(ValueError, match="the hidden states of member 1 have shape"):
        fused_divergence(hidden, head, [teacher_hidden[0], teacher_hidden[1][:2]], teacher_heads, [0.5, 0.5])


def test_the_reference_refuses_what_the_fused_loss_does():
    with pytest.raises(ValueError, match=r"beta is -0\.1"):
        token_divergence(torch.zeros(1, 2), torch.zeros(1, 2), -0.1)
