"""The mixture as a model of transformers: forward, freezing, saving and loading, bad input."""

import copy
import json
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2ForCausalLM

from logitmix.mixture.configuration import LogitMixConfig
from logitmix.mixture.modeling import LogitMixForCausalLM
from tests.helpers.members import ARCHITECTURES, PAD, VOCAB_SIZE, character_tokenizer, tiny_config, tiny_member

INPUT = {
    "input_ids": torch.tensor([[PAD, PAD, 5, 17, 9], [12, 50, 7, 33, 4]]),
    "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
}


@pytest.fixture
def pair():
    return tiny_member("qwen2", 0), tiny_member("llama", 1)


@pytest.fixture
def model(pair):
    return LogitMixForCausalLM.from_members(*pair, alpha=0.3)


def logits(model, **kwargs):
    with torch.no_grad():
        return model(**INPUT, **kwargs).logits


# --- forward ------------------------------------------------------------------------------------------------------


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
def test_at_the_ends_of_alpha_the_logits_are_a_members_own(model, pair, alpha):
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


def test_the_fields_of_the_output_are_the_members_one_after_another(pair):
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
def test_score_gives_the_log_probs_of_the_distribution_that_forward_gives(pair, scheme, temperature):
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


def test_use_cache_of_the_configuration_holds_unless_the_call_says_otherwise(model):
    """Trainers turn it off there."""
    assert model(**INPUT).past_key_values is not None
    model.config.use_cache = False
    assert model(**INPUT).past_key_values is None
    assert model(**INPUT, use_cache=True).past_key_values is not None


def test_number_of_items_in_the_batch_divides_the_loss(model):
    """transformers' Trainer passes it, for gradient accumulation."""
    mean = model(**INPUT, labels=INPUT["input_ids"]).loss
    total = model(**INPUT, labels=INPUT["input_ids"], num_items_in_batch=torch.tensor(16)).loss
    torch.testing.assert_close(total, mean * 8 / 16)


def test_what_the_members_agree_on_the_configuration_answers(model):
    other = LogitMixForCausalLM.from_members(tiny_member("qwen2", 0), tiny_member("qwen2", 1)).config
    assert (other.num_attention_heads, other.num_key_value_heads) == (4, 2)
    assert not hasattr(model.config, "num_attention_heads")  # 4 and 3


def test_building_a_mixture_leaves_the_members_weights_alone():
    torch.manual_seed(0)
    raw = Qwen2ForCausalLM(tiny_config("qwen2")).eval()  # not through from_config or from_pretrained
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
    real = INPUT["attention_mask"] == 1  # what a padding token attends to is each implementation's own
    torch.testing.assert_close(logits(model)[real], before[real])


def test_moving_to_another_dtype_moves_every_member(model):
    model.to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert logits(model).dtype == torch.float32  # members' logits are mixed in float32


# --- freezing -----------------------------------------------------------------------------------------------------


def is_frozen(model):
    return all(not p.requires_grad for anchor in model.anchors for p in anchor.parameters()) and not any(
        module.training for anchor in model.anchors for module in anchor.modules()
    )


def test_anchors_are_frozen_from_the_start_and_stay_frozen(model, tmp_path):
    assert is_frozen(model)
    assert all(p.requires_grad for p in model.policy.parameters())
    model.train()
    assert model.policy.training
    assert is_frozen(model)
    model.requires_grad_(True)
    assert is_frozen(model)
    model.gradient_checkpointing_enable()
    assert is_frozen(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert is_frozen(loaded)
    assert all(p.requires_grad for p in loaded.policy.parameters())
    assert is_frozen(copy.deepcopy(model))


def test_anchors_have_no_dropout_while_the_policy_trains():
    members = [tiny_member("llama", seed, attention_dropout=0.5) for seed in (0, 1)]
    model = LogitMixForCausalLM.from_members(*members).train()
    assert torch.equal(logits(model, alpha=1.0), logits(model, alpha=1.0))
    assert not torch.equal(logits(model, alpha=0.0), logits(model, alpha=0.0))


def gradients(model, **kwargs):
    model.zero_grad()
    model(**INPUT, labels=INPUT["input_ids"], **kwargs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_reach_the_policy_alone_scaled_by_its_weight(model, pair):
    """Eq. 6: through the factor (1 - alpha); the anchor's logits are a constant."""
    policy = copy.deepcopy(pair[0])
    z_policy = policy(**INPUT).logits
    z_mix = (0.7 * z_policy + 0.3 * logits(pair[1])).detach().requires_grad_()
    torch.nn.functional.cross_entropy(z_mix[:, :-1].flatten(0, 1), INPUT["input_ids"][:, 1:].flatten()).backward()
    z_policy.backward((1 - 0.3) * z_mix.grad)

    actual = gradients(model.train())
    assert all(name.startswith("policy.") for name in actual)
    assert {name.removeprefix("policy.") for name in actual} == {name for name, _ in policy.named_parameters()}
    for name, p in policy.named_parameters():
        torch.testing.assert_close(actual[f"policy.{name}"], p.grad)


def test_no_gradient_reaches_an_anchor_whose_parameters_were_unfrozen_one_by_one(model):
    """As code does that walks over `model.parameters()`."""
    for p in model.parameters():
        p.requires_grad = True
    assert all(name.startswith("policy.") for name in gradients(model.train()))


@pytest.mark.parametrize("arguments", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_gradient_checkpointing_does_not_change_the_gradients(model, arguments):
    expected = gradients(model.train())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    if arguments == {"use_reentrant": True}:
        model.enable_input_require_grads()
    assert model.is_gradient_checkpointing
    actual = gradients(model)
    assert actual.keys() == expected.keys()
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name])
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_an_optimizer_step_moves_the_policy_alone(model):
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    gradients(model.train())
    optimizer.step()
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in after if name.startswith("anchor_0."))
    assert any(not torch.equal(after[name], before[name]) for name in after if name.startswith("policy."))


# --- saving and loading -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("scheme", ["logit", "prob"])
def test_a_saved_mixture_comes_back_bit_for_bit(tmp_path, scheme, tied):
    members = [tiny_member(a, i, tie_word_embeddings=tied) for i, a in enumerate(["qwen2", "llama", "qwen2"])]
    model = LogitMixForCausalLM.from_members(members[0], members[1:], weights=[0.5, 0.3, 0.2], scheme=scheme)
    model.save_pretrained(tmp_path)
    loaded, info = LogitMixForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    for back in (loaded, AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert torch.equal(logits(back), logits(model))
        assert (back.config.weights, back.config.scheme) == (model.config.weights, scheme)
        assert [type(member) for member in back.members] == [type(member) for member in members]
        for member in back.members:
            assert (member.lm_head.weight is member.get_input_embeddings().weight) is tied
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(again)), logits(model))


def test_one_member_may_tie_its_embeddings_and_the_other_not(tmp_path):
    model = LogitMixForCausalLM.from_members(
        tiny_member("qwen2", 0), tiny_member("qwen2", 1, tie_word_embeddings=True)
    )
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_comes_back_bit_for_bit_as_the_anchor(tmp_path, architecture):
    model = LogitMixForCausalLM.from_members(tiny_member("qwen2", 0), tiny_member(architecture, 1))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_a_mixture_saved_in_shards_comes_back_bit_for_bit(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_bfloat16_comes_back_as_bfloat16(tmp_path):
    model = LogitMixForCausalLM.from_members(*(tiny_member("qwen2", s, dtype=torch.bfloat16) for s in (0, 1)))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(loaded), logits(model))


def test_a_checkpoint_loads_in_the_dtype_asked_for(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    for name, p in loaded.named_parameters():
        assert torch.equal(p, model.get_parameter(name).bfloat16())


def test_members_of_different_dtypes_mix_and_are_loaded_in_the_policys(tmp_path):
    policy, anchor = tiny_member("qwen2", 0), tiny_member("llama", 1, dtype=torch.bfloat16)
    model = LogitMixForCausalLM.from_members(policy, anchor, alpha=0.3)
    torch.testing.assert_close(logits(model), 0.7 * logits(policy) + 0.3 * logits(anchor).float())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    # transformers loads a checkpoint in one dtype; the anchor's weights are the same numbers
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    for name, p in loaded.named_parameters():
        assert torch.equal(p, model.get_parameter(name).float())


def test_checkpoint_loads_with_a_device_map_and_an_attention_implementation(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu", attn_implementation="eager")
    assert [member.config._attn_implementation for member in loaded.members] == ["eager", "eager"]
    real = INPUT["attention_mask"] == 1  # what a padding token attends to is each implementation's own
    torch.testing.assert_close(logits(loaded)[real], logits(model)[real])
    assert is_frozen(loaded)


def test_the_policy_alone_exports_as_an_ordinary_checkpoint(model, pair, tmp_path):
    model.policy.save_pretrained(tmp_path)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(exported) is Qwen2ForCausalLM
    assert torch.equal(logits(exported), logits(pair[0]))
    assert torch.equal(logits(exported), logits(model, alpha=0.0))


def test_members_given_as_folders_bring_their_tokenizer_and_generation_config(tmp_path):
    tokenizer = character_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}="
    for seed, name in enumerate(["base", "sft"]):
        member = tiny_member("qwen2", seed)
        member.generation_config = GenerationConfig(temperature=0.3, do_sample=True, eos_token_id=2, pad_token_id=PAD)
        member.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    model = LogitMixForCausalLM.from_members(str(tmp_path / "base"), str(tmp_path / "sft"), alpha=0.3)
    model.save_pretrained(tmp_path / "mixture")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "mixture")
    back = AutoTokenizer.from_pretrained(tmp_path / "mixture")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.generation_config.temperature == 0.3
    assert loaded.generation_config.eos_token_id == 2
    assert back.get_vocab() == tokenizer.get_vocab()
    assert back.chat_template == tokenizer.chat_template
    loaded.save_pretrained(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again").get_vocab() == tokenizer.get_vocab()


def test_members_may_be_given_as_paths(tmp_path):
    for seed, name in enumerate(["base", "sft"]):
        tiny_member("qwen2", seed).save_pretrained(tmp_path / name)
    model = LogitMixForCausalLM.from_members(tmp_path / "base", [tmp_path / "sft"])
    assert torch.equal(logits(model, alpha=1.0), logits(tiny_member("qwen2", 1)))


def test_a_mixture_has_a_generation_config_of_its_own(model, pair):
    model.generation_config.temperature = 0.123
    assert pair[0].generation_config.temperature != 0.123


def test_configuration_survives_json_pickle_and_copy(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "logitmix"
    assert saved["members"] == ["policy", "anchor_0"]
    for config in (
        AutoConfig.from_pretrained(tmp_path),
        pickle.loads(pickle.dumps(model.config)),
        copy.deepcopy(model.config),
    ):
        assert isinstance(config, LogitMixConfig)
        assert config.weights == model.config.weights
        assert [type(c) for c in config.member_configs] == [type(c) for c in model.config.member_configs]
        assert config.num_hidden_layers == 5
        assert (config.vocab_size, config.get_text_config().vocab_size) == (VOCAB_SIZE, VOCAB_SIZE)


def test_parameters_have_no_bare_integer_before_the_layers(model):
    """vLLM reads the one integer of a weight's path as its layer."""
    assert all(sum(part.isdigit() for part in name.split(".")) <= 1 for name in model.state_dict())


# --- vocabularies and tokenizers ------------------------------------------------------------------------------------


def test_vocabularies_that_differ_in_padding_rows_mix_over_the_shared_tokens(tmp_path):
    """As Qwen2.5's do: 151,936 rows at 1.5B and 3B, 152,064 at 7B."""
    members = [tiny_member("qwen2", 0), tiny_member("llama", 1, vocab_size=VOCAB_SIZE + 7)]
    tokenizer = character_tokenizer()
    for member, name in zip(members, ["base", "sft"], strict=True):
        member.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    model = LogitMixForCausalLM.from_members(str(tmp_path / "base"), str(tmp_path / "sft"), alpha=0.3)
    assert model.config.vocab_size == VOCAB_SIZE
    expected = 0.7 * logits(members[0]) + 0.3 * logits(members[1])[..., :VOCAB_SIZE]
    torch.testing.assert_close(logits(model), expected)
    assert logits(model, alpha=1.0).shape[-1] == VOCAB_SIZE
    generated = model.generate(**INPUT, max_new_tokens=20, do_sample=True, top_k=0, alpha=1.0)
    assert generated.max() < VOCAB_SIZE


def save_with_tokenizer(path, characters, **kwargs):
    tiny_member("qwen2", 0, **kwargs).save_pretrained(path)
    character_tokenizer(characters).save_pretrained(path)
    return str(path)


def test_different_tokenizers_are_refused_with_the_first_token_that_differs(tmp_path):
    base = save_with_tokenizer(tmp_path / "base", "abcd")
    with pytest.raises(ValueError, match=r"token 5 is 'c' in '.*base' and 'x' in '.*sft'"):
        LogitMixForCausalLM.from_members(base, save_with_tokenizer(tmp_path / "sft", "abxd"))
    with pytest.raises(ValueError, match=r"token 7 is missing in '.*base' and 'e' in '.*longer'"):
        LogitMixForCausalLM.from_members(base, save_with_tokenizer(tmp_path / "longer", "abcde"))


def test_a_vocabulary_that_lacks_tokens_of_the_tokenizer_is_refused(tmp_path):
    base = save_with_tokenizer(tmp_path / "base", "abcd")
    small = save_with_tokenizer(tmp_path / "small", "abcd", vocab_size=6)
    with pytest.raises(ValueError, match="the tokenizer has 7 tokens, but a member has logits for only 6"):
        LogitMixForCausalLM.from_members(base, small)


# --- bad input ----------------------------------------------------------------------------------------------------


def test_a_member_that_does_not_exist_is_refused(pair, tmp_path):
    missing = str(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"no model at '.*missing'"):
        LogitMixForCausalLM.from_members(pair[0], missing)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no model at '.*empty': the folder has no config.json"):
        LogitMixForCausalLM.from_members(pair[0], str(tmp_path / "empty"))


def test_the_same_model_object_twice_is_refused(pair):
    with pytest.raises(ValueError, match=r"same model object is given twice.*deepcopy"):
        LogitMixForCausalLM.from_members(pair[0], pair[0])
    with pytest.raises(ValueError, match="same model object is given twice"):
        LogitMixForCausalLM.from_members(pair[0], [pair[1], pair[1]], weights=[0.5, 0.25, 0.25])


def test_a_mixture_as_a_member_is_refused(model, pair):
    with pytest.raises(ValueError, match="a member is itself a mixture"):
        LogitMixForCausalLM.from_members(model, pair[1])


def test_a_mixture_without_anchors_is_refused(pair):
    with pytest.raises(ValueError, match="needs at least one anchor"):
        LogitMixForCausalLM.from_members(pair[0], [])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"weights": [0.5, 0.25, 0.25]}, r"weights have shape \[3\] for 2 members"),
        ({"weights": [float("nan"), 0.5]}, "not finite"),
        ({"alpha": float("inf")}, "not finite"),
        ({"alpha": [0.2, 0.5]}, r"own weights are 2 numbers, got \[2, 2\]"),
        ({"alpha": 1.2, "scheme": "prob"}, r"within \[0, 1\]"),
        ({"alpha": 0.5, "weights": [0.5, 0.5]}, "alpha or weights, not both"),
        ({"scheme": "geometric"}, "scheme is 'geometric'; it must be one of 'logit', 'prob'"),
    ],
)
def test_bad_weights_are_refused_when_the_mixture_is_built(pair, kwargs, message):
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
def test_bad_weights_are_refused_in_a_call(pair, call, kwargs, message):
    model = LogitMixForCausalLM.from_members(*pair, scheme="prob")
    with pytest.raises(ValueError, match=message):
        getattr(model, call)(**INPUT, **kwargs, **({"max_new_tokens": 1} if call == "generate" else {}))


def test_alpha_is_for_one_anchor(pair):
    third = tiny_member("gpt2", 2)
    with pytest.raises(ValueError, match="3 members have no default weights"):
        LogitMixForCausalLM.from_members(pair[0], [pair[1], third])
    with pytest.raises(ValueError, match="3 members need weights"):
        LogitMixForCausalLM.from_members(pair[0], [pair[1], third], alpha=0.5)
    model = LogitMixForCausalLM.from_members(pair[0], [pair[1], third], weights=[0.4, 0.3, 0.3])
    with pytest.raises(ValueError, match="3 members need weights"):
        model(**INPUT, alpha=0.5)
    with pytest.raises(ValueError, match="3 members has weights, not an alpha"):
        model.alpha  # noqa: B018


def test_setting_alpha_changes_the_default_and_is_saved(model, pair, tmp_path):
    model.alpha = 0.9
    torch.testing.assert_close(logits(model), 0.1 * logits(pair[0]) + 0.9 * logits(pair[1]))
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).alpha == 0.9
    with pytest.raises(ValueError, match="not finite"):
        model.alpha = float("nan")
    with pytest.raises(ValueError, match="own weights are 2 numbers"):
        model.alpha = [0.2, 0.5]
    assert model.alpha == 0.9


def test_embeddings_as_input_are_refused(model):
    with pytest.raises(ValueError, match="takes input_ids, not inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 2, 32))


def test_resizing_the_vocabulary_is_refused(model):
    with pytest.raises(ValueError, match="cannot resize its vocabulary"):
        model.resize_token_embeddings(100)


def test_a_checkpoint_of_a_newer_format_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    with pytest.raises(ValueError, match=r"format version 99.*install a newer logitmix"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_no_backbone_or_output_embedding_stands_for_the_mixture(model):
    """TRL's fused LM head would score with the policy's, silently, while `generate` samples from the mixture."""
    assert model.get_output_embeddings() is None
    assert model.base_model is model


# --- adapters of PEFT -----------------------------------------------------------------------------------------------


def test_an_adapter_of_the_policy_trains_merges_and_saves(model, tmp_path):
    adapter = LoraConfig(target_modules=r"policy\..*q_proj", init_lora_weights=False)
    adapted = get_peft_model(model, adapter).train()
    adapted(**INPUT, labels=INPUT["input_ids"]).loss.backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert all(".policy." in name and "lora_" in name for name in trained)
    expected = logits(adapted.eval())
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(merged))


def test_an_adapter_inside_a_member_is_not_lost_on_saving(model, pair, tmp_path):
    model.policy.add_adapter(LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="adapter 'default' of PEFT that the mixture does not know; merge it"):
        model.save_pretrained(tmp_path)


def test_a_model_wrapped_by_peft_is_refused_as_a_member(pair):
    wrapped = get_peft_model(pair[0], LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"got PeftModel; for a new adapter on the policy give the plain model"):
        LogitMixForCausalLM.from_members(wrapped, pair[1])


def test_alpha_can_be_given_on_loading(tmp_path):
    LogitMixForCausalLM.from_members(tiny_member(seed=0), tiny_member(seed=1), alpha=0.5).save_pretrained(tmp_path)
    assert LogitMixForCausalLM.from_pretrained(tmp_path, alpha=0.2).alpha == 0.2
    assert LogitMixForCausalLM.from_pretrained(tmp_path).alpha == 0.5
