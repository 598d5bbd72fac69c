"""`FusedScorer` against `LogitMixForCausalLM.score`."""

import pytest
import torch

from logitmix.loss_head.scorer import FusedScorer
from tests.helpers.grpo import LOSS_HEAD_MODELS, mixture


def batch():
    ids = torch.randint(3, 58, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :5] = -100
    labels[2, 7:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("model", LOSS_HEAD_MODELS)
@pytest.mark.parametrize("weights", [None, [0.0, 1.0], [1.0, 0.0], [[0.2, 0.8], [1.0, 0.0], [0.5, 0.5]]], ids=str)
def test_scores_match_the_models_own(model, weights):
    model = LOSS_HEAD_MODELS[model]()
    with torch.no_grad():
        scores = FusedScorer(model)(**batch(), temperature=0.7, weights=weights)
        expected = model.score(**batch(), temperature=0.7, weights=weights)
    torch.testing.assert_close((scores.log_probs, scores.entropy), expected, atol=1e-5, rtol=1e-5)


def test_a_batch_without_scored_tokens():
    inputs = batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    model = mixture()
    scores = FusedScorer(model)(**inputs, diagnose=True)
    assert not scores.log_probs.any()
    scores.log_probs.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.policy.parameters())


@pytest.mark.parametrize("name", ["policy", "anchor"])
def test_members_that_read_different_prompts(name):
    model, prompts = mixture(), {name: [[5, 6], [7], [8, 9, 10, 11, 12, 13, 14]]}
    losses = []
    for score in (FusedScorer(model), model.score):
        model.zero_grad()
        log_probs, entropy, *_ = score(**batch(), temperature=0.7, member_prompts=prompts)
        log_probs.sum().backward()
        losses.append((log_probs, entropy, model.policy.get_input_embeddings().weight.grad.clone()))
    torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(losses[0][0], model.score(**batch(), temperature=0.7)[0])
