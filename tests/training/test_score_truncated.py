"""With `score_truncated`, rollouts are scored on the tokens that top-k, top-p and min-p kept when they were sampled.

Shape legend: B sequences, T completion tokens, V vocabulary.
"""

import copy

import pytest
import torch
from transformers import GenerationConfig

from logitmix.mixture.generation import default_generation_config, generate_completions
from logitmix.mixture.padding import left_pad
from tests.helpers.grpo import PROMPTS, mixture, trainer_of
from tests.helpers.members import VOCAB_SIZE, character_tokenizer, tiny_member

TRUNCATIONS = {
    "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.6, "temperature": 0.7},
    "min-p": {"min_p": 0.1, "temperature": 1.3},
    "all of them": {"top_k": 20, "top_p": 0.9, "min_p": 0.02, "temperature": 1.5},
    "with a least length": {"top_k": 4, "generation_kwargs": {"min_new_tokens": 3}},
}
truncations = pytest.mark.parametrize("truncation", TRUNCATIONS.values(), ids=TRUNCATIONS)
SEVERAL_UPDATES = {"num_iterations": 2, "per_device_train_batch_size": 6, "steps_per_generation": 2}


def truncated(tmp_path, model=None, **options):
    return trainer_of(tmp_path, model, score_truncated=True, **options)


def batch_of(trainer, seed=3):
    """The batch of an outer step, with the log-probabilities under the policy that sampled."""
    torch.manual_seed(seed)
    trainer.model.train()
    return trainer.make_batch([{"prompt": prompt} for prompt in PROMPTS for _ in range(4)])


def move(model, seed=0):
    """Change the policy, as an update does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.policy.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))


@truncations
@pytest.mark.parametrize("scheme", ["logit", "prob"])
def test_the_scored_distribution_is_the_one_that_generate_samples_from(tmp_path, truncation, scheme):
    """The same tokens as by transformers' own warpers, from one seed, with the log-probabilities of its scores."""
    trainer = truncated(tmp_path, mixture(scheme), **truncation, **SEVERAL_UPDATES)
    batch = batch_of(trainer)
    rows = [prompt for prompt in PROMPTS for _ in range(4)]
    tokenizer = trainer.processing_class
    input_ids, attention_mask = left_pad(tokenizer(rows)["input_ids"], tokenizer.pad_token_id, torch.device("cpu"))
    torch.manual_seed(3)
    with default_generation_config(trainer.model):
        output = trainer.model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=GenerationConfig(**trainer.generation_kwargs),
            output_scores=True,
            return_dict_in_generate=True,
        )
    completions = output.sequences[:, input_ids.shape[1] :]
    scores_BTV = torch.stack(output.scores, 1)
    expected = scores_BTV.log_softmax(-1).gather(-1, completions[..., None])[..., 0]
    mask = batch["completion_mask"].bool()
    assert torch.equal(batch["completion_ids"], completions)
    torch.testing.assert_close(batch["old_per_token_logps"][mask], expected[mask], rtol=1e-4, atol=1e-4)
    for b, support in enumerate(batch["supports"]):
        kept_TV = scores_BTV[b, : len(support["sizes"])] > -torch.inf
        assert support["ids"].tolist() == kept_TV.nonzero()[:, 1].tolist()
        assert len(support["sizes"]) == mask[b].sum()
    assert (torch.cat([support["sizes"] for support in batch["supports"]]) < VOCAB_SIZE).any()


@pytest.mark.parametrize("loss_head", ["fused", "reference"])
@pytest.mark.parametrize("scheme", ["logit", "prob"])
@pytest.mark.parametrize("truncation", [{"top_p": 0.8}, {"top_k": 7, "temperature": 0.6}], ids=["top-p", "top-k"])
def test_the_mean_of_the_ratio_is_1_by_enumeration(tmp_path, loss_head, scheme, truncation):
    """E over y ~ m_old^S of m_new^S(y) / m_old^S(y): every token of the support takes the place of the sampled one."""
    trainer = truncated(tmp_path, mixture(scheme), loss_head=loss_head, **truncation, **SEVERAL_UPDATES)
    batch = batch_of(trainer)
    prompt, support = batch["prompt_ids"][0], batch["supports"][0]
    kept = support["ids"][: support["sizes"][0]]
    assert 1 < len(kept) < VOCAB_SIZE
    ids = torch.cat([prompt.expand(len(kept), -1), kept[:, None]], 1).long()
    mask = torch.cat([batch["prompt_mask"][0].expand(len(kept), -1), torch.ones(len(kept), 1, dtype=torch.long)], 1)
    trainer.supports = [{"sizes": support["sizes"][:1], "ids": kept}] * len(kept)

    def log_probs():
        with torch.no_grad():
            return trainer.score_tokens(trainer.model, ids, mask, 1)[0][:, 0].double()

    old = log_probs()
    move(trainer.model)
    new = log_probs()
    assert (new - old).abs().max() > 0.05
    torch.testing.assert_close(old.exp().sum().item(), 1.0, rtol=0, atol=1e-5)
    torch.testing.assert_close((old.exp() * (new - old).exp()).sum().item(), 1.0, rtol=0, atol=1e-5)


@pytest.mark.parametrize("loss_head", ["fused", "reference"])
@pytest.mark.parametrize("scheme", ["logit", "prob"])
def test_the_ratio_is_1_before_the_first_update_and_moves_after(tmp_path, loss_head, scheme):
    trainer = truncated(tmp_path, mixture(scheme), loss_head=loss_head, top_p=0.8, max_steps=4, **SEVERAL_UPDATES)
    trainer.train()
    first, second, *_ = [log for log in trainer.state.log_history if "ratio/min" in log]
    assert first["ratio/min"] == first["ratio/max"] == 1
    assert second["ratio/min"] < 1 < second["ratio/max"]
    assert second["ratio/max"] < float("inf")


def test_the_fused_head_and_the_reference_agree_on_loss_and_gradient(tmp_path):
    found = []
    for loss_head in ("fused", "reference"):
        trainer = truncated(tmp_path, mixture(), loss_head=loss_head, top_p=0.7, **SEVERAL_UPDATES)
        batch = batch_of(trainer)
        move(trainer.model)
        loss = trainer.loss(trainer.model, batch)
        loss.backward()
        gradients = [weight.grad for weight in trainer.model.policy.parameters() if weight.grad is not None]
        found.append((loss.detach(), gradients))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    assert any(gradient.abs().max() > 1e-4 for gradient in found[0][1])


def test_tokens_outside_the_support_do_not_change_the_loss(tmp_path):
    """A bias of the head moves the logits of a token that no position kept; without truncation the loss changes."""
    model = mixture(policy="llama")
    trainer = truncated(tmp_path, model, top_k=3, **SEVERAL_UPDATES)
    batch = batch_of(trainer)
    kept = set(torch.cat([support["ids"] for support in batch["supports"]]).tolist())
    kept |= set(batch["completion_ids"].unique().tolist()) | set(batch["prompt_ids"].unique().tolist())
    outside = next(token for token in range(VOCAB_SIZE) if token not in kept)
    whole = {key: value for key, value in batch.items() if key != "supports"}
    with torch.no_grad():
        losses = [trainer.score(trainer.model, b, "dapo").log_probs.clone() for b in (batch, whole)]
        model.policy.lm_head.weight[outside] *= 3
        moved = [trainer.score(trainer.model, b, "dapo").log_probs for b in (batch, whole)]
    torch.testing.assert_close(moved[0], losses[0], rtol=0, atol=1e-6)
    assert (moved[1] - losses[1]).abs().max() > 1e-3


def test_the_kl_to_the_anchor_is_one_on_the_support(tmp_path):
    options = {"beta": 0.1, "kl_to": "anchor", "loss_type": "grpo", "top_k": 4}
    trainer = truncated(tmp_path, mixture(), **options, **SEVERAL_UPDATES)
    batch = batch_of(trainer)
    mask = batch["completion_mask"].bool()
    support = batch["supports"][0]
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)[:1]
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)[:1]
    with torch.no_grad():
        logits = trainer.model(input_ids=ids, attention_mask=attention_mask, alpha=1.0).logits
    first_V = logits[0, batch["prompt_ids"].shape[1] - 1]
    kept = support["ids"][: support["sizes"][0]].long()
    expected = first_V[batch["completion_ids"][0, 0]] - first_V[kept].logsumexp(0)
    torch.testing.assert_close(batch["ref_per_token_logps"][0, 0], expected, rtol=1e-4, atol=1e-4)
    assert torch.isfinite(batch["ref_per_token_logps"][mask]).all()


def test_rollouts_in_parts_and_truncated_completions_keep_their_supports(tmp_path):
    options = {"rollout_batch_size": 5, "mask_truncated_completions": True, "top_p": 0.8}
    trainer = truncated(tmp_path, **options, **SEVERAL_UPDATES)
    batch = batch_of(trainer)
    lengths = batch["completion_mask"].sum(1).tolist()
    assert 0 in lengths
    assert len(batch["supports"]) == len(lengths)
    trainer.loss(trainer.model, batch).backward()


def test_a_resumed_run_matches_an_uninterrupted_one_bit_for_bit(tmp_path):
    """From a checkpoint between two updates on the same rollouts, whose supports it holds."""
    options = {"top_p": 0.8, "min_p": 0.02, "max_steps": 6, **SEVERAL_UPDATES}
    model = mixture()
    whole = truncated(tmp_path / "run", copy.deepcopy(model), save_strategy="steps", save_steps=1, **options)
    whole.train()
    expected = whole.model.state_dict()
    for step in (1, 3, 4):
        resumed = truncated(tmp_path / "run", copy.deepcopy(model), **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items()), step


@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_a_truncation_that_is_not_scored_is_refused_with_the_way_out(tmp_path, options):
    with pytest.raises(ValueError, match=r"another distribution than the one.*, or set score_truncated$"):
        trainer_of(tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "score_truncated is True, but nothing would read it: it goes with top_k, top_p or min_p"),
        ({"top_k": 1}, "top_k is 1; it must be at least 2"),
        ({"top_k": -3}, "top_k is -3; it must be at least 2"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be between 0 and 1"),
        ({"top_p": 1.5}, "top_p is 1.5; it must be between 0 and 1"),
        ({"min_p": 1.0}, "min_p is 1.0; it must be between 0 and 1"),
        ({"top_p": 0.9, "repetition_penalty": 1.2}, "repetition_penalty is 1.2"),
        ({"top_p": 0.9, "generation_kwargs": {"top_p": 1.0}}, "leave it out, and set top_p, which is 0.9"),
        ({"top_p": 0.9, "dynamic_sampling": "refill"}, "dynamic_sampling is 'refill'.*use 'filter', or leave out"),
        ({"top_p": 0.9, "tools": [len]}, "tools is given, and a rollout of several turns"),
        ({"top_p": 0.9, "model": tiny_member()}, "the model has no anchor.*set anchor, or leave out score_truncated"),
    ],
)
def test_what_cannot_be_scored_exactly_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        truncated(tmp_path, **options)


def test_vllm_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("logitmix.training.config_checks.is_vllm_available", lambda: True)
    with pytest.raises(ValueError, match="use_vllm is set, and vLLM does not tell which tokens it kept"):
        truncated(tmp_path, top_p=0.9, use_vllm=True)


def test_alternating_decoding_records_no_supports():
    with pytest.raises(ValueError, match="alternating decoding cannot be used with a SupportRecorder"):
        generate_completions(
            mixture(), character_tokenizer(), [[5]], {"max_new_tokens": 2}, decoding="alternating", supports=[]
        )
