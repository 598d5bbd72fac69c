"""The mixture's forward and scores, as a model of transformers."""

import copy

import pytest
import torch
from transformers import Qwen2ForCausalLM

from logitmix.mixture.modeling import LogitMixForCausalLM
from tests.helpers.members import (
    INPUT,
    logits,
    tiny_config,
    tiny_member,
)


def test_logits_are_the_weighted_sum_of_the_members(model, pair):
    policy, anchor = (logits(member) for member in pair)
    torch.testing.assert_close(logits(model), 0.7 * policy + 0.3 * anchor)
    torch.testing.assert_close(logits(model, alpha=0.9), 0.1 * policy + 0.9 * anchor)
    torch.testing.assert_close(logits(model, weights=[1.5, -0.5]), 1.5 * policy - 0.5 * anchor)
    rows = logits(model, alpha=torch.tensor([0.0, 0.6]))
    torch.testing.assert_close(rows[0], policy[0])
    torch.testing.assert_close(rows[1], 0.4 * policy[1] + 0.6 * anchor[1])


def test_probabilities_are_the_weighted_sum_of_the_members(pair):
    model = LogitMixForCausalLM.from_members(*pair, alpha=0.3, scheme="prob")
    policy, anchor = (logits(member).softmax(-1) for member in pair)
    torch.testing.assert_close(logits(model).exp(), 0.7 * policy + 0.3 * anchor)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_logits_at_alpha_0_and_1_are_those_of_one_member(model, pair, alpha):
    assert torch.equal(logits(model, alpha=alpha), logits(pair[int(alpha)]))


def test_logits_to_keep_takes_a_number_or_positions(model):
    full = logits(model)
    torch.testing.assert_close(logits(model, logits_to_keep=2), full[:, -2:])
    torch.testing.assert_close(logits(model, logits_to_keep=torch.tensor([1, 3])), full[:, [1, 3]])


def test_loss_is_the_cross_entropy_of_the_mixture(model):
    labels = INPUT["input_ids"].masked_fill(INPUT["attention_mask"] == 0, -100)
    out = model(**INPUT, labels=labels)
    log_probs = out.logits.log_softmax(-1)
    picked = [log_probs[b, t - 1, labels[b, t]] for b in (0, 1) for t in range(1, 5) if labels[b, t] != -100]
    assert len(picked) == 7
    torch.testing.assert_close(out.loss, -torch.stack(picked).mean())


def test_num_items_in_batch_divides_the_loss(model):
    """The Trainer of transformers passes it, for gradient accumulation."""
    mean = model(**INPUT, labels=INPUT["input_ids"]).loss
    total = model(**INPUT, labels=INPUT["input_ids"], num_items_in_batch=torch.tensor(16)).loss
    torch.testing.assert_close(total, mean * 8 / 16)


def test_output_fields_concatenate_those_of_the_members(pair):
    for member in pair:
        member.set_attn_implementation("eager")
    model = LogitMixForCausalLM.from_members(*pair)
    out = model(**INPUT, output_hidden_states=True, output_attentions=True)
    assert [x.shape[-1] for x in out.hidden_states] == [32] * 3 + [24] * 4
    assert [x.shape[1] for x in out.attentions] == [4] * 2 + [3] * 3
    assert len(out.past_key_values.layers) == 5
    as_tuple = model(**INPUT, return_dict=False)
    assert torch.equal(as_tuple[0], out.logits)


@pytest.mark.parametrize("scheme", ["logit", "prob"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_score_matches_the_log_probs_of_forward(pair, scheme, temperature):
    model = LogitMixForCausalLM.from_members(*pair, alpha=0.3, scheme=scheme)
    labels = INPUT["input_ids"].clone()
    labels[:, :3] = -100
    assert model.score(**INPUT, labels=labels)[0].requires_grad
    log_probs, entropy = model.score(**INPUT, labels=labels, temperature=temperature)
    expected = (model(**INPUT).logits[:, :-1] / temperature).log_softmax(-1)
    picked = expected.gather(-1, INPUT["input_ids"][:, 1:, None]).squeeze(-1)
    assert log_probs.shape == entropy.shape == (2, 4)
    torch.testing.assert_close(log_probs[:, 2:], picked[:, 2:])
    torch.testing.assert_close(entropy[:, 2:], -(expected.exp() * expected).sum(-1)[:, 2:])
    assert (log_probs[:, :2] == 0).all()
    assert (entropy[:, :2] == 0).all()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_score_does_not_depend_on_left_padding(architecture):
    model = LogitMixForCausalLM.from_members(tiny_member("qwen2", 0), tiny_member(architecture, 1), alpha=0.3)
    labels = INPUT["input_ids"].masked_fill(INPUT["attention_mask"] == 0, -100)
    padded, _ = model.score(**INPUT, labels=labels)
    alone = INPUT["input_ids"][:1, 2:]
    expected, _ = model.score(alone, torch.ones_like(alone), alone)
    torch.testing.assert_close(padded[:1, 2:], expected)


def test_use_cache_defaults_to_the_configuration(model):
    """Trainers turn the cache off in the configuration."""
    assert model(**INPUT).past_key_values is not None
    model.config.use_cache = False
    assert model(**INPUT).past_key_values is None
    assert model(**INPUT, use_cache=True).past_key_values is not None


def test_configuration_has_the_attributes_on_which_the_members_agree(model):
    other = LogitMixForCausalLM.from_members(tiny_member("qwen2", 0), tiny_member("qwen2", 1)).config
    assert (other.num_attention_heads, other.num_key_value_heads) == (4, 2)
    assert not hasattr(model.config, "num_attention_heads")  # 4 and 3


def test_the_mixture_has_no_backbone_or_output_embedding(model):
    """TRL's fused LM head would silently score with the policy's, while `generate` samples from the mixture."""
    assert model.get_output_embeddings() is None
    assert model.base_model is model


def test_building_a_mixture_does_not_change_the_members_weights():
    torch.manual_seed(0)
    raw = Qwen2ForCausalLM(tiny_config("qwen2")).eval()  # neither from_config nor from_pretrained
    torch.nn.init.normal_(raw.lm_head.weight)
    members = [raw, tiny_member("llama", 1)]
    before = [copy.deepcopy(member.state_dict()) for member in members]
    LogitMixForCausalLM.from_members(*members)
    for member, state in zip(members, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in member.state_dict().items())


def test_compiled_forward_gives_the_same_logits(model):
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(logits(compiled), logits(model))
    torch.testing.assert_close(logits(compiled, alpha=0.8), logits(model, alpha=0.8))


def test_a_deep_copy_shares_nothing(model):
    other = copy.deepcopy(model)
    assert torch.equal(logits(other), logits(model))
    with torch.no_grad():
        other.policy.lm_head.weight.zero_()
    assert not torch.equal(logits(other), logits(model))


def test_attention_implementation_reaches_every_member(model):
    before = logits(model)
    model.set_attn_implementation("eager")
    assert [member.config._attn_implementation for member in model.members] == ["eager", "eager"]
    real = INPUT["attention_mask"] == 1  # padding tokens attend differently in each implementation
    torch.testing.assert_close(logits(model)[real], before[real])


def test_changing_the_dtype_changes_every_member(model):
    model.to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert logits(model).dtype == torch.float32


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"weights": [0.5, 0.25, 0.25]}, r"weights have shape \[3\] for 2 members"),
        ({"weights": [float("nan"), 0.5]}, "not finite"),
        ({"alpha": float("inf")}, "not finite"),
        ({"alpha": [0.2, 0.5]}, r"default weights of a mixture are 2 numbers, got shape \[2, 2\]"),
        ({"alpha": 1.2, "scheme": "prob"}, r"within \[0, 1\]"),
        ({"alpha": 0.5, "weights": [0.5, 0.5]}, "alpha or weights, not both"),
        ({"scheme": "geometric"}, "scheme is 'geometric'; it must be one of 'logit', 'prob'"),
    ],
)
def test_invalid_weights_are_rejected_when_building_a_mixture(pair, kwargs, message):
    with pytest.raises(ValueError, match=message):
        LogitMixForCausalLM.from_members(*pair, **kwargs)


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"weights": [0.5, 0.25, 0.25]}, r"weights have shape \[3\] for 2 members"),
        ({"weights": [float("nan"), 0.5]}, "not finite"),
        ({"alpha": 1.2}, r"within \[0, 1\]"),
        ({"alpha": [0.2, 0.5, 0.8]}, "weights have 3 rows for a batch of 2 sequences"),
        ({"alpha": [[0.2], [0.5]]}, r"alpha has shape \[2, 1\]"),
        ({"alpha": 0.5, "weights": [0.5, 0.5]}, "alpha or weights, not both"),
    ],
)
def test_invalid_weights_are_rejected_in_a_call(pair, call, kwargs, message):
    model = LogitMixForCausalLM.from_members(*pair, scheme="prob")
    with pytest.raises(ValueError, match=message):
        getattr(model, call)(**INPUT, **kwargs, **({"max_new_tokens": 1} if call == "generate" else {}))


def test_alpha_requires_exactly_one_anchor(pair):
    third = tiny_member("gpt2", 2)
    with pytest.raises(ValueError, match="3 members have no default weights"):
        LogitMixForCausalLM.from_members(pair[0], [pair[1], third])
    with pytest.raises(ValueError, match="3 members need weights"):
        LogitMixForCausalLM.from_members(pair[0], [pair[1], third], alpha=0.5)
    model = LogitMixForCausalLM.from_members(pair[0], [pair[1], third], weights=[0.4, 0.3, 0.3])
    with pytest.raises(ValueError, match="3 members need weights"):
        model(**INPUT, alpha=0.5)
    with pytest.raises(ValueError, match="alpha needs 2 members, the mixture has 3; use"):
        model.alpha  # noqa: B018


@pytest.mark.parametrize("decoding", ["joint", "alternating"])
def test_ids_and_positions_without_an_embedding_are_refused(decoding):
    model = LogitMixForCausalLM.from_members(tiny_member("llama"), tiny_member("gpt2", 1)).eval()
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "decoding": decoding}
    with pytest.raises(ValueError, match=r"anchor_0 has no embedding .* its context 128; shorten the prompt"):
        model.generate(torch.full((1, 126), 5), **settings)
    with pytest.raises(ValueError, match=r"policy has no embedding of .* its vocabulary has 61 tokens"):
        model.generate(torch.tensor([[5, 61]]), **settings)


def test_a_prompt_without_tokens_is_refused(model):
    for ids in (torch.empty(1, 0, dtype=torch.long), torch.empty(2, 0)):  # the second is of a tokenizer, of "" twice
        with pytest.raises(ValueError, match="input_ids have no tokens; a prompt needs at least one"):
            model(input_ids=ids)


def test_inputs_embeds_are_rejected(model):
    with pytest.raises(ValueError, match="takes input_ids, not inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 2, 32))


def test_resizing_the_vocabulary_is_rejected(model):
    with pytest.raises(ValueError, match="cannot resize its vocabulary"):
        model.resize_token_embeddings(100)
