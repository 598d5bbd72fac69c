"""The plausibility cut: whose it is, and where it is applied."""

import json

import pytest
import torch

from logitmix.loss_head.scorer import FusedScorer
from logitmix.mixture.mixing import Plausibility, mix_logits
from logitmix.mixture.modeling import LogitMixForCausalLM
from tests.helpers.members import INPUT, tiny_member

LABELS = INPUT["input_ids"].masked_fill(INPUT["attention_mask"] == 0, -100)


@pytest.fixture
def cut(model):
    model.config.set_plausibility(0.3, "anchor")
    return model.eval()


def test_the_cut_is_that_of_the_named_member(cut):
    with torch.no_grad():
        mixed, anchor = cut(**INPUT).logits, cut.anchor_0(**INPUT).logits
        cut.config.set_plausibility(None)
        whole = cut(**INPUT).logits
    p = anchor.softmax(-1)
    is_plausible = p >= 0.3 * p.amax(-1, keepdim=True)
    assert 0 < is_plausible.float().mean() < 0.5
    assert torch.equal(mixed, whole.masked_fill(~is_plausible, -torch.inf))


@pytest.mark.parametrize("scheme", ["logit", "prob"])
def test_a_member_alone_has_no_cut(scheme):
    logits = list(torch.randn(2, 3, 3, 7, generator=torch.Generator().manual_seed(0)).double())
    weights = [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]
    whole, mixed = mix_logits(logits, weights, scheme), mix_logits(logits, weights, scheme, Plausibility(0.5, 1))
    assert torch.equal(mixed[:2], whole[:2])
    assert torch.isneginf(mixed[2]).any()
    for alone in weights[:2]:
        assert torch.equal(mix_logits(logits, alone, scheme, Plausibility(0.5, 1)), mix_logits(logits, alone, scheme))


def test_the_most_probable_token_is_left_at_a_plausibility_of_1(model):
    model.eval().config.set_plausibility(1)
    with torch.no_grad():
        mixed, policy = model(**INPUT).logits, model.policy(**INPUT).logits
    is_read = INPUT["attention_mask"].bool()
    assert (torch.isfinite(mixed[is_read]).sum(-1) == 1).all()
    assert torch.equal(mixed[is_read].argmax(-1), policy[is_read].argmax(-1))


def test_scores_are_those_of_the_cut_distribution(cut):
    with torch.no_grad():
        log_probs, entropy = cut.score(**INPUT, labels=LABELS, temperature=0.7)
        expected = (cut(**INPUT).logits.double() / 0.7).log_softmax(-1)[:, :-1]
    targets, scored = LABELS[:, 1:].clamp(min=0), LABELS[:, 1:] != -100
    picked = expected.gather(-1, targets[..., None])[..., 0].float()
    assert torch.isneginf(picked[scored]).any()
    torch.testing.assert_close(log_probs[scored], picked[scored])
    terms = (expected.exp() * expected.masked_fill(torch.isneginf(expected), 0)).sum(-1)
    torch.testing.assert_close(entropy[scored], -terms[scored].float())


def test_sampled_tokens_are_plausible(cut):
    torch.manual_seed(0)
    output = cut.generate(**INPUT, max_new_tokens=8, do_sample=True, top_k=0, num_return_sequences=8)
    mask = torch.nn.functional.pad(INPUT["attention_mask"].repeat_interleave(8, 0), (0, 8), value=1)
    labels = output.clone()
    labels[:, : INPUT["input_ids"].shape[1]] = -100
    log_probs, _ = cut.score(output, mask, labels)
    assert torch.isfinite(log_probs).all()


def test_alternating_decoding_has_the_cut(cut):
    joint = cut.generate(**INPUT, max_new_tokens=12, do_sample=False)
    assert torch.equal(cut.generate(**INPUT, max_new_tokens=12, do_sample=False, decoding="alternating"), joint)
    cut.config.set_plausibility(None)
    assert not torch.equal(cut.generate(**INPUT, max_new_tokens=12, do_sample=False), joint)


def test_the_fused_loss_head_refuses_the_cut(cut):
    with pytest.raises(ValueError, match=r'plausibility 0\.3, which the fused loss head .* loss_head="reference"'):
        FusedScorer(cut)


def test_a_member_that_does_not_exist_has_no_cut(model):
    with pytest.raises(ValueError, match="no member 'expert'; the members are policy, anchor_0"):
        model.config.set_plausibility(0.1, "expert")


def test_earlier_versions_refuse_a_checkpoint_with_a_cut(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["format_version"] == 1
    model.config.plausibility = 0.1
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["format_version"] == 2
    assert LogitMixForCausalLM.from_pretrained(tmp_path).config.cut == Plausibility(0.1, 0)


def test_members_that_share_a_head_are_cut(tmp_path):
    from peft import LoraConfig

    base = tiny_member()
    shared = LogitMixForCausalLM.from_members(base, base, weights=[1.5, -0.5], peft_config=LoraConfig(r=2)).eval()
    for name, parameter in shared.policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = shared(**INPUT).logits
        shared.config.set_plausibility(0.3)
        mixed = shared(**INPUT).logits
        with shared.as_member("policy") as policy:
            p = policy(**INPUT).logits.softmax(-1)
    is_plausible = p >= 0.3 * p.amax(-1, keepdim=True)
    torch.testing.assert_close(mixed, whole.masked_fill(~is_plausible, -torch.inf), atol=1e-4, rtol=1e-4)
