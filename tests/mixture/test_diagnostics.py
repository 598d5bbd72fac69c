"""The diagnostics of a mixture compared with their definition, in float64 and token by token.

Shape legend: K members, B batch, T time, V vocabulary.
"""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from logitmix.mixture import logprobs as log_probs_module
from logitmix.mixture.diagnostics import mixture_diagnostics
from logitmix.mixture.mixing import SCHEMES, mix_logits
from logitmix.mixture.modeling import LogitMixForCausalLM
from tests.helpers.members import tiny_member
from tests.helpers.random_logits import draw_logits

INF = torch.inf
B, T, V = 3, 5, 11
random_logits = partial(draw_logits, (B, T, V))
both_schemes = pytest.mark.parametrize("scheme", SCHEMES)


def naive(logits: list[Tensor], weights: list[float], scheme: str, temperature: float):
    """For each token: the KLs and the three booleans, from probabilities as Python floats."""
    for b in range(B):
        for t in range(T):
            members = [z[b, t].double().softmax(-1).tolist() for z in logits]
            if scheme == "prob":
                mixture = [sum(w * p[v] for w, p in zip(weights, members, strict=True)) for v in range(V)]
            else:
                mixture = [math.prod(p[v] ** w for w, p in zip(weights, members, strict=True)) for v in range(V)]
            sampled, *rest = (
                [x / sum(heated) for x in heated]
                for heated in ([p ** (1 / temperature) for p in dist] for dist in (mixture, *members))
            )
            kls = [sum(p * math.log(p / q) for p, q in zip(sampled, other, strict=True)) for other in rest]
            top, policy, *anchors = (max(range(V), key=dist.__getitem__) for dist in (mixture, *members))
            yield kls, any(a != policy for a in anchors), top == policy, top != policy and top in anchors


@both_schemes
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("weights", [[0.7, 0.3], [0.2, 0.5, 0.3]])
def test_matches_the_definition(scheme, temperature, weights):
    logits = random_logits(len(weights))
    found = mixture_diagnostics(logits, mix_logits(logits, weights, scheme), temperature)
    rows = list(naive(logits, weights, scheme, temperature))
    torch.testing.assert_close(
        found.kl_K.view(B * T, -1), torch.tensor([row[0] for row in rows], dtype=torch.float64), rtol=1e-9, atol=1e-12
    )
    assert found.disagree.flatten().tolist() == [row[1] for row in rows]
    assert found.policy_wins.flatten().tolist() == [row[1] and row[2] for row in rows]
    assert found.anchor_wins.flatten().tolist() == [row[1] and row[3] for row in rows]
    assert len({(row[1], row[2], row[3]) for row in rows}) >= 2, "the cases are not all alike"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_are_compared_in_float32(dtype):
    logits = random_logits(2, dtype)
    found = mixture_diagnostics(logits, mix_logits(logits, [0.4, 0.6]), 0.8)
    expected = torch.tensor([row[0] for row in naive(logits, [0.4, 0.6], "logit", 0.8)], dtype=torch.float64)
    torch.testing.assert_close(found.kl_K.double().view(B * T, -1), expected, rtol=1e-5, atol=1e-6)


def test_equal_members_have_kl_0_and_no_winner():
    (z,) = random_logits(1, torch.float32)
    found = mixture_diagnostics([z, z + 5], mix_logits([z, z + 5], [0.3, 0.7]))  # logits may differ by a constant
    torch.testing.assert_close(found.kl_K, torch.zeros(B, T, 2), atol=1e-6, rtol=0)
    assert (found.kl_K >= 0).all()
    assert not (found.disagree | found.policy_wins | found.anchor_wins).any()


def test_a_single_active_member_has_kl_0():
    logits = random_logits(2)
    found = mixture_diagnostics(logits, mix_logits(logits, [1.0, 0.0]))
    assert found.kl_K[..., 0].max() < 1e-12
    assert found.kl_K[..., 1].min() > 0
    assert torch.equal(found.policy_wins, found.disagree)


def test_kl_is_infinite_only_if_a_member_rules_out_a_token_of_the_mixture():
    policy, anchor = random_logits(2)
    policy[..., 3] = -INF
    geometric = mixture_diagnostics([policy, anchor], mix_logits([policy, anchor], [0.5, 0.5]))
    assert torch.isfinite(geometric.kl_K).all()
    arithmetic = mixture_diagnostics([policy, anchor], mix_logits([policy, anchor], [0.5, 0.5], "prob"))
    assert torch.isinf(arithmetic.kl_K[..., 0]).all(), "the policy gives 0 to a token of the mixture"
    assert torch.isfinite(arithmetic.kl_K[..., 1]).all()


def test_neither_wins_if_the_mixture_picks_a_third_token():
    policy, anchor = torch.tensor([[5.0, 0.0, 4.0]]), torch.tensor([[0.0, 5.0, 4.0]])
    found = mixture_diagnostics([policy, anchor], mix_logits([policy, anchor], [0.5, 0.5]))
    assert found.disagree.item()
    assert not found.policy_wins.item()
    assert not found.anchor_wins.item()


@both_schemes
@pytest.mark.parametrize("chunk_elements", [1, 1 << 26])
def test_diagnostics_align_with_the_scores(monkeypatch, scheme, chunk_elements):
    monkeypatch.setattr(log_probs_module, "_CHUNK_ELEMENTS", chunk_elements)
    model = LogitMixForCausalLM.from_members(
        tiny_member("qwen2", seed=0), tiny_member("llama", seed=1), alpha=0.4, scheme=scheme
    )
    ids = torch.randint(3, 61, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    labels = ids.clone()
    labels[:, :3] = -100
    labels[1, 5] = -100
    log_probs, entropy, found = model.score_and_diagnose(ids, mask, labels, temperature=0.7)
    torch.testing.assert_close((log_probs, entropy), model.score(ids, mask, labels, temperature=0.7))
    members = [member(ids).logits[:, :-1] for member in model.members]
    expected = mixture_diagnostics(members, mix_logits(members, [0.6, 0.4], scheme), 0.7)
    ignored = labels[:, 1:] == -100
    torch.testing.assert_close(found.kl_K, expected.kl_K.masked_fill(ignored[..., None], 0.0), rtol=1e-4, atol=1e-5)
    for field in ("disagree", "policy_wins", "anchor_wins"):
        assert torch.equal(getattr(found, field), getattr(expected, field) & ~ignored)
    assert not found.kl_K.requires_grad
