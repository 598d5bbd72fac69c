"""Members that share a linear head: the mixture multiplies by it once."""

import pytest
import torch
import transformers
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from logitmix.mixture.modeling import LogitMixForCausalLM
from tests.helpers.adapters import mixture, save_adapter
from tests.helpers.members import INPUT, logits


def head_calls(model):
    """A list to which every product with the policy's head appends its shape."""
    calls = []
    model.policy.get_output_embeddings().register_forward_hook(lambda module, args, output: calls.append(output.shape))
    return calls


def shared_head_pair(architecture, weights, **kwargs):
    """A mixture in float64 whose anchor is the base."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, f"{architecture}Config")(**SMALL | kwargs)
        member = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
        with torch.no_grad():
            for name, parameter in member.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_()
        adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = LogitMixForCausalLM.from_members(member, member, weights=weights, peft_config=adapter)
    model(**INPUT)  # infers the head's transform
    return model


SMALL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "initializer_range": 0.3, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1.5, -0.25], torch.tensor([[0.7, 0.3], [1.0, 0.0]])], ids=str)
@pytest.mark.parametrize(
    ("architecture", "kwargs", "products"),
    [
        ("Qwen2", {}, 1),
        ("Qwen2", {"tie_word_embeddings": True}, 1),
        ("Phi", {}, 1),  # a bias
        ("Granite", {"logits_scaling": 8.0}, 1),
        ("Cohere", {"logit_scale": 0.0625}, 1),
        ("Gemma2", {"final_logit_softcapping": 5.0, "head_dim": 16}, 2),  # not linear
        ("Gemma2", {"final_logit_softcapping": None, "head_dim": 16}, 1),
    ],
)
def test_a_shared_head_multiplies_once_and_gives_the_mixed_logits(architecture, kwargs, products, weights):
    model = shared_head_pair(architecture, [0.5, 0.5], **kwargs)
    calls = head_calls(model)
    actual = logits(model, weights=weights)
    assert len(calls) == products
    members = [logits(model, weights=one) for one in ([1.0, 0.0], [0.0, 1.0])]
    rows = torch.as_tensor(weights, dtype=torch.float64).expand(2, 2)
    expected = sum(rows[:, k, None, None] * members[k] for k in (0, 1))
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)
    assert (members[0] - members[1]).abs().max() > 0.01


def test_a_shared_head_multiplies_only_the_kept_positions(folders):
    model = mixture("two adapters", folders)
    full = logits(model)
    calls = head_calls(model)
    torch.testing.assert_close(logits(model, logits_to_keep=2), full[:, -2:])
    torch.testing.assert_close(logits(model, logits_to_keep=torch.tensor([1, 3])), full[:, [1, 3]])
    model.generate(**INPUT, max_new_tokens=3, do_sample=False, alpha=0.4)
    assert [shape[1] for shape in calls] == [2, 2, 1, 1, 1]


def test_different_heads_or_the_scheme_prob_multiply_for_each_member(folders, tmp_path):
    with_head = save_adapter(tmp_path / "head", folders["base"], 3, target_modules=["q_proj", "lm_head"])
    for model in (
        mixture("two adapters", folders, scheme="prob"),
        LogitMixForCausalLM.from_members(folders["policy adapter"], with_head),
        LogitMixForCausalLM.from_members(with_head, folders["base"]),
    ):
        before = logits(model)
        calls = head_calls(model)
        assert torch.equal(logits(model), before)
        assert len(calls) == 2
    one = mixture("full anchor", folders)
    calls = head_calls(one)
    logits(one)
    assert len(calls) == 1, "the anchor has a head of its own"


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_score_with_a_shared_head_matches_forward(folders, temperature):
    model = mixture("two adapters", folders)
    log_probs, entropy = model.score(**INPUT, labels=INPUT["input_ids"], temperature=temperature)
    diagnosed = model.score_and_diagnose(**INPUT, labels=INPUT["input_ids"], temperature=temperature)
    assert torch.equal(diagnosed[0], log_probs), "a ratio of the two is exactly 1"
    assert log_probs.requires_grad
    expected = (model(**INPUT).logits[:, :-1] / temperature).log_softmax(-1)
    picked = expected.gather(-1, INPUT["input_ids"][:, 1:, None]).squeeze(-1)
    real = INPUT["attention_mask"][:, :-1] == 1
    torch.testing.assert_close(log_probs[real], picked[real])
    torch.testing.assert_close(entropy[real], -(expected.exp() * expected).sum(-1)[real])
