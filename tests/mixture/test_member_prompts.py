"""Members that read different prompts, compared with a loop that runs each member on its own tokens.

The loop has no cache, padding or batch: each member reads its prompt and the shared tokens, in float32, and the logits
are mixed in float64.
"""

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig, LogitsProcessorList

from logitmix.loss_head.scorer import FusedScorer
from logitmix.mixture.generation import GREEDY, generate_completions
from logitmix.mixture.member_prompts import read_prompts
from logitmix.mixture.modeling import LogitMixForCausalLM
from tests.helpers.members import PAD, character_tokenizer, tiny_member
from tests.mixture.test_generation import NEW_TOKENS, PROMPTS, generate, left_padded, mixture

OTHERS = [[3, 4, 5], [6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [20]]
THIRD = [[30], [31, 32], [33, 34, 35]]


@torch.no_grad()
def reference_logits(members, weights, scheme, contexts):
    """The mixture's logits `[V]` after the tokens `contexts`, one list for each member."""
    logits = [
        m(torch.tensor([ids]), use_cache=False).logits[0, -1].double()
        for m, ids in zip(members, contexts, strict=True)
    ]
    if scheme == "logit":
        return sum(w * z for w, z in zip(weights, logits, strict=True))
    return sum(w * z.softmax(-1) for w, z in zip(weights, logits, strict=True)).log()


def reference(members, weights, prompts, scheme="logit", temperature=None, new_tokens=NEW_TOKENS):
    """New tokens `[B, new_tokens]`; `prompts` are one list of prompts for each member."""
    rows = [weights] * len(prompts[0]) if isinstance(weights[0], float) else weights
    new = [[] for _ in prompts[0]]
    for _ in range(new_tokens):
        logits = torch.stack([
            reference_logits(members, rows[i], scheme, [list(own[i]) + new[i] for own in prompts])
            for i in range(len(new))
        ])  # fmt: skip
        if temperature is None:
            chosen = logits.argmax(-1)
        else:
            chosen = torch.multinomial((logits / temperature).softmax(-1).float(), num_samples=1).squeeze(1)
        for tokens, token in zip(new, chosen.tolist(), strict=True):
            tokens.append(token)
    return torch.tensor(new)


@pytest.fixture(scope="module")
def pair():
    return mixture("qwen2", "llama")


PAIRS = [
    ("qwen2", "llama"),
    ("qwen2-sliding", "gemma2"),
    ("gpt2", "mixtral"),
]


@pytest.mark.parametrize("scheme", ["logit", "prob"])
@pytest.mark.parametrize("architectures", PAIRS, ids="+".join)
def test_each_member_reads_its_own_prompt(architectures, scheme):
    model, members = mixture(*architectures, scheme=scheme)
    expected = reference(members, [0.6, 0.4], [PROMPTS, OTHERS], scheme)
    for cache in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        assert torch.equal(generate(model, alpha=0.4, member_prompts={"anchor": OTHERS}, **cache), expected), cache
    assert not torch.equal(expected, reference(members, [0.6, 0.4], [PROMPTS, PROMPTS], scheme))
    assert not torch.equal(expected, reference(members, [0.6, 0.4], [OTHERS, OTHERS], scheme))


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=str)
def test_the_policy_reads_its_own_prompt(pair, cache):
    model, members = pair
    expected = reference(members, [0.6, 0.4], [OTHERS, PROMPTS])
    assert torch.equal(generate(model, alpha=0.4, member_prompts={"policy": OTHERS}, **cache), expected)


def test_without_input_ids_the_sequences_begin_with_the_policys_prompt(pair):
    model, members = pair
    output = model.generate(
        member_prompts={"policy": PROMPTS, "anchor": OTHERS}, alpha=0.4, pad_token_id=PAD, **GREEDY,
        max_new_tokens=NEW_TOKENS,
    )  # fmt: skip
    ids = left_padded(PROMPTS)["input_ids"]
    assert torch.equal(output, torch.cat([ids, reference(members, [0.6, 0.4], [PROMPTS, OTHERS])], dim=1))


@pytest.mark.parametrize("scheme", ["logit", "prob"])
def test_three_members_read_three_prompts(scheme):
    weights = [1.0, 0.8, -0.6] if scheme == "logit" else [0.5, 0.3, 0.2]
    model, members = mixture("qwen2", "llama", "gpt2", weights=weights, scheme=scheme)
    prompts = {"anchor_0": OTHERS, "anchor_1": THIRD}
    expected = reference(members, weights, [PROMPTS, OTHERS, THIRD], scheme)
    assert torch.equal(generate(model, member_prompts=prompts), expected)
    rows = [[1.0, 0.0, 0.0], [0.2, 0.3, 0.5], [0.0, 0.5, 0.5]]
    expected = reference(members, rows, [PROMPTS, OTHERS, THIRD], scheme)
    assert torch.equal(generate(model, weights=rows, member_prompts=prompts), expected)


def test_adapters_on_one_base_read_different_prompts():
    from peft import LoraConfig

    policy = tiny_member("qwen2")
    config = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = LogitMixForCausalLM.from_members(policy, policy, peft_config=config)

    def member(name):
        def run(*args, **kwargs):
            with model.as_member(name) as running:
                return running(*args, **kwargs)

        return run

    expected = reference([member("policy"), member("anchor_0")], [0.6, 0.4], [PROMPTS, OTHERS])
    assert torch.equal(generate(model, alpha=0.4, member_prompts={"anchor": OTHERS}), expected)


@pytest.mark.parametrize("scheme", ["logit", "prob"])
def test_seeded_samples_match_the_reference(pair, scheme):
    members = pair[1]
    model = LogitMixForCausalLM.from_members(members[0], members[1], scheme=scheme)
    torch.manual_seed(7)
    expected = reference(members, [0.5, 0.5], [PROMPTS, OTHERS], scheme, temperature=0.7)
    torch.manual_seed(7)
    sampled = generate(model, do_sample=True, temperature=0.7, top_k=0, top_p=1.0, member_prompts={"anchor": OTHERS})
    assert torch.equal(sampled, expected)


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=str)
def test_beams_and_returned_sequences_are_those_of_each_sequence_alone(pair, cache):
    model, members = pair
    arguments = {"num_beams": 3, "num_return_sequences": 2, "alpha": 0.4, **cache}
    together = generate(model, member_prompts={"anchor": OTHERS}, **arguments)
    alone = [
        generate(model, [own], member_prompts={"anchor": [other]}, **arguments)
        for own, other in zip(PROMPTS, OTHERS, strict=True)
    ]
    assert torch.equal(together, torch.cat(alone))
    total = [_log_prob(members, PROMPTS[0], OTHERS[0], tokens.tolist()) for tokens in together[:2]]
    greedy = _log_prob(members, PROMPTS[0], OTHERS[0], reference(members, [0.6, 0.4], [PROMPTS, OTHERS])[0].tolist())
    assert total[0] >= max(total[1], greedy - 1e-5)


def _log_prob(members, own, other, tokens):
    return sum(
        reference_logits(members, [0.6, 0.4], "logit", [own + tokens[:i], other + tokens[:i]]).log_softmax(-1)[token]
        for i, token in enumerate(tokens)
    )


def test_every_sequence_has_its_own_alpha(pair):
    model, members = pair
    expected = reference(members, [[1.0, 0.0], [0.3, 0.7], [0.0, 1.0]], [PROMPTS, OTHERS])
    assert torch.equal(generate(model, alpha=[0.0, 0.7, 1.0], member_prompts={"anchor": OTHERS}), expected)


def test_one_prompt_is_for_all_sequences(pair):
    model, members = pair
    expected = reference(members, [0.5, 0.5], [PROMPTS, [[3, 4, 5]] * 3])
    for prompt in ([3, 4, 5], [[3, 4, 5]], torch.tensor([3, 4, 5]), torch.tensor([[3, 4, 5]])):
        assert torch.equal(generate(model, member_prompts={"anchor_0": prompt}), expected)


def test_prompts_are_ids_masks_or_texts(pair):
    model, members = pair
    expected = reference(members, [0.5, 0.5], [PROMPTS, OTHERS])
    padded = left_padded(OTHERS)
    right = [ids + [PAD] * (10 - len(ids)) for ids in OTHERS]
    right = {"input_ids": torch.tensor(right), "attention_mask": torch.tensor(right) != PAD}
    ragged = {"input_ids": OTHERS, "attention_mask": [[1] * len(ids) for ids in OTHERS]}
    tensors = [torch.tensor(each) for each in OTHERS]
    for prompts in (padded, padded["input_ids"], padded["input_ids"].numpy(), right, ragged, tensors):
        assert torch.equal(generate(model, member_prompts={"anchor": prompts}), expected)
    tokenizer = character_tokenizer()
    texts = ["abc", "negative: 1+1", "x"]
    expected = reference(members, [0.5, 0.5], [PROMPTS, tokenizer(texts)["input_ids"]])
    assert torch.equal(generate(model, member_prompts={"anchor": texts}, tokenizer=tokenizer), expected)


def test_settings_that_a_generation_config_lacks_are_the_models_own(pair):
    """The padding of ids without a mask, as `generate` takes it."""
    model, members = pair
    expected = reference(members, [0.5, 0.5], [PROMPTS, OTHERS])
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False)
    output = model.generate(
        **left_padded(PROMPTS), generation_config=config, member_prompts={"anchor": left_padded(OTHERS)["input_ids"]}
    )
    assert torch.equal(output[:, -NEW_TOKENS:], expected)


def test_a_rendered_chat_has_one_bos():
    tokenizer = character_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    rows = read_prompts(["<bos>ab", "ab", "<bos><bos>a"], "anchor", tokenizer, None)
    assert rows == [[1, 3, 4], [1, 3, 4], [1, 1, 3]]


def test_repeated_prompts_are_read_once_only_where_all_members_repeat_theirs(pair):
    model, members = pair
    own, other = [PROMPTS[i] for i in (0, 0, 1, 0)], [OTHERS[i] for i in (0, 1, 0, 0)]
    rows = []
    hook = model.policy.register_forward_pre_hook(lambda m, a, kw: rows.append(len(kw["input_ids"])), with_kwargs=True)
    output = generate(model, own, member_prompts={"anchor": other})
    hook.remove()
    assert torch.equal(output, reference(members, [0.5, 0.5], [own, other]))
    assert rows[0] == 3


def test_a_sequence_stops_at_its_own_end(pair):
    model, members = pair
    new = reference(members, [0.5, 0.5], [PROMPTS, OTHERS])
    eos = int(new[0, 3])
    config = GenerationConfig(eos_token_id=eos, pad_token_id=PAD, max_new_tokens=NEW_TOKENS)
    output = generate(model, member_prompts={"anchor": OTHERS}, generation_config=config, max_new_tokens=NEW_TOKENS)
    for tokens, expected in zip(output.tolist(), new.tolist(), strict=True):
        end = expected.index(eos) + 1 if eos in expected else NEW_TOKENS
        assert tokens == expected[:end] + [PAD] * (len(tokens) - end)


def test_completions_of_lists_of_prompts(pair):
    model, members = pair
    tokenizer = character_tokenizer()
    settings = GREEDY | {"max_new_tokens": NEW_TOKENS, "eos_token_id": 60}
    completions = generate_completions(model, tokenizer, PROMPTS, settings, member_prompts={"anchor": OTHERS})
    for tokens, expected in zip(completions, reference(members, [0.5, 0.5], [PROMPTS, OTHERS]).tolist(), strict=True):
        assert tokens == expected[: expected.index(60) + 1 if 60 in expected else None]


def test_processors_see_input_ids_alone(pair):
    """A longer prompt of another member adds no tokens, and no padding, to what is penalised."""
    seen = []

    def record(input_ids, scores):
        seen.append(input_ids.tolist())
        return scores

    generate(
        pair[0], [PROMPTS[1]], member_prompts={"anchor": OTHERS[1]}, logits_processor=LogitsProcessorList([record])
    )
    assert seen[0] == [PROMPTS[1]]


# --- forward and score ----------------------------------------------------------------------------------------

SHARED = [[41, 42, 43], [44, 45, 46], [47, 48, 49]]


def sequences():
    """The prompts, and the shared tokens after them; and labels of the shared tokens."""
    inputs = left_padded([own + shared for own, shared in zip(PROMPTS, SHARED, strict=True)])
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    return inputs, labels


def expected_logits(members, scheme="logit"):
    """`[B, 4, V]`: before each of the shared tokens, and after the last."""
    rows = zip(PROMPTS, OTHERS, SHARED, strict=True)
    return torch.stack([
        torch.stack([
            reference_logits(members, [0.6, 0.4], scheme, [own + shared[:i], other + shared[:i]]) for i in range(4)
        ])
        for own, other, shared in rows
    ])  # fmt: skip


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("scheme", ["logit", "prob"])
def test_forward_returns_the_logits_of_the_shared_tokens(pair, scheme, use_cache):
    members = pair[1]
    model = LogitMixForCausalLM.from_members(*members, scheme=scheme)
    inputs, labels = sequences()
    settings = {"member_prompts": {"anchor": OTHERS}, "alpha": 0.4, "use_cache": use_cache}
    output = model(**inputs, **settings, logits_to_keep=4)
    expected = expected_logits(members, scheme)
    torch.testing.assert_close(output.logits, expected.float(), atol=1e-4, rtol=1e-4)

    loss = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), torch.tensor(SHARED).flatten())
    for keep in ({}, {"logits_to_keep": 4}):
        assert model(**inputs, **settings, **keep, labels=labels).loss.item() == pytest.approx(loss.item(), rel=1e-5)


def test_forward_without_shared_tokens_returns_the_logits_of_the_next(pair):
    model, members = pair
    logits = model(**left_padded(PROMPTS), member_prompts={"anchor": OTHERS}, alpha=0.4).logits
    torch.testing.assert_close(logits, expected_logits(members)[:, :1].float(), atol=1e-4, rtol=1e-4)


def test_forward_continues_from_its_cache(pair):
    model, members = pair
    inputs, prompts = left_padded(PROMPTS), {"anchor": OTHERS}
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    output = model(**inputs, position_ids=positions, member_prompts=prompts, alpha=0.4)
    shared, logits = torch.tensor(SHARED), [output.logits]
    for start, stop in ((0, 1), (1, 3)):
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, stop, dtype=torch.long)], dim=1)
        output = model(
            shared[:, start:stop], mask, mask.cumsum(-1)[:, start - stop :] - 1, output.past_key_values,
            member_prompts=prompts, alpha=0.4,
        )  # fmt: skip
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected_logits(members).float(), atol=1e-4, rtol=1e-4)


def test_gradients_reach_the_policy_alone(pair):
    model, members = pair
    inputs, labels = sequences()
    model.zero_grad()
    model(**inputs, member_prompts={"anchor": OTHERS}, labels=labels).loss.backward()
    assert all(p.grad is None for p in model.anchor_0.parameters())
    gradients = {name: p.grad.clone() for name, p in model.policy.named_parameters() if p.grad is not None}
    model.zero_grad()
    with torch.no_grad():
        other = left_padded([other + shared for other, shared in zip(OTHERS, SHARED, strict=True)])
        positions = (other["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        other = members[1](**other, position_ids=positions).logits[:, -4:-1]
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    own = members[0](**inputs, position_ids=positions).logits[:, -4:-1]
    mixed = 0.5 * own + 0.5 * other
    torch.nn.functional.cross_entropy(mixed.flatten(0, 1), torch.tensor(SHARED).flatten()).backward()
    for name, parameter in members[0].named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-4, rtol=1e-3)
    model.zero_grad()


@pytest.mark.parametrize("scheme", ["logit", "prob"])
def test_scores_are_the_log_probabilities_of_the_shared_tokens(pair, scheme):
    members = pair[1]
    model = LogitMixForCausalLM.from_members(*members, scheme=scheme)
    inputs, labels = sequences()
    settings = {"labels": labels, "alpha": 0.4, "temperature": 0.7, "member_prompts": {"anchor": OTHERS}}
    with torch.no_grad():
        log_probs, entropy = model.score(**inputs, **settings)
        diagnosed = model.score_and_diagnose(**inputs, **settings)
    expected = (expected_logits(members, scheme)[:, :-1] / 0.7).log_softmax(-1)
    chosen = expected.gather(-1, torch.tensor(SHARED)[..., None]).squeeze(-1)
    torch.testing.assert_close(log_probs[:, -3:], chosen.float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(entropy[:, -3:], -(expected.exp() * expected).sum(-1).float(), atol=1e-4, rtol=1e-4)
    assert not log_probs[:, :-3].any()
    assert torch.equal(diagnosed[0], log_probs)


def test_prompts_of_other_lengths_are_scored_only_with_padding_on_the_left(pair):
    """Padded on the right, the ends of the longer prompts would count as shared tokens."""
    model, rows = pair[0], [own + shared for own, shared in zip(PROMPTS, SHARED, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    starts = torch.tensor([len(prompt) for prompt in PROMPTS])[:, None]
    labels = ids.masked_fill((mask == 0) | (torch.arange(width) < starts), -100)
    prompts = {"anchor": OTHERS}
    for use in (
        lambda: model.score(ids, mask, labels, member_prompts=prompts),
        lambda: model(ids, mask, labels=labels, member_prompts=prompts),
        lambda: FusedScorer(model)(ids, mask, labels, member_prompts=prompts),
    ):
        with pytest.raises(ValueError, match="pad the prompts on the left, so that all end at one token"):
            use()
    inputs, labels = sequences()
    labels[1, -3] = -100  # a token that is not scored ends no prompt
    model.score(**inputs, labels=labels, member_prompts=prompts)


# --- bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"member_prompts": {"anchor_7": [1]}}, "there is no member 'anchor_7'; the members are policy, anchor_0"),
        ({"member_prompts": {"anchor": [1], "anchor_0": [2]}}, "two prompts for anchor_0; leave one out"),
        ({"member_prompts": [[1]]}, "member_prompts is a list, but must be a dict"),
        (
            {"member_prompts": {"anchor": [[1], [2]]}},
            "2 prompts for anchor_0, but the batch has 3 sequences",
        ),
        ({"member_prompts": {"anchor": []}}, "the prompt of anchor_0 .*empty"),
        ({"member_prompts": {"anchor": [[1], [], [2]]}}, "the prompt of anchor_0 for sequence 1 is empty"),
        ({"member_prompts": {"anchor": torch.tensor([[PAD, PAD]])}}, "the prompt of anchor_0 is empty"),
        ({"member_prompts": {"anchor": [61]}}, "the prompt of anchor_0 has a token id outside 0 to 60"),
        ({"member_prompts": {"anchor": 5}}, "the prompt of anchor_0 is a int, but must be a text, token ids"),
        ({"member_prompts": {"anchor": [[1.5]]}}, "the prompt of anchor_0 is a list, but must be a text, token ids"),
        ({"member_prompts": {"anchor": ["a", 5]}}, "the prompt of anchor_0 is a list, but must be a text, token ids"),
        ({"member_prompts": {"anchor": "a text"}}, "the prompt of anchor_0 is a text; pass tokenizer="),
        (
            {"member_prompts": {"anchor": [1] * 121}},
            "the prompt of anchor_0 has 121 tokens; with max_new_tokens 8",
        ),
        ({"member_prompts": {"anchor": [1] * 128}}, "the prompt of anchor_0 has 128 tokens, which leaves no room"),
        (
            {"member_prompts": {"policy": [1], "anchor": [1]}},
            "a prompt for every member, so none would read",
        ),
        ({"member_prompts": {"anchor": [1]}, "prefill_chunk_size": 2}, "prefill_chunk_size"),
        ({"member_prompts": {"anchor": [1]}, "prompt_lookup_num_tokens": 2}, "generation mode 'assisted_generation'"),
        ({"member_prompts": {"anchor": [1]}, "decoding": "alternating"}, "alternating decoding cannot be used with"),
        (
            {"member_prompts": {"anchor": [1]}, "output_member_logprobs": True, "return_dict_in_generate": True},
            "output_member_logprobs cannot be used with",
        ),
    ],
)
def test_bad_prompts_are_refused_in_one_sentence(pair, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        generate(pair[0], **arguments)
    assert "\n" not in str(error.value)


def test_embeddings_and_caches_with_tokens_are_refused(pair):
    model = pair[0]
    with pytest.raises(ValueError, match="member_prompts need input_ids, not inputs_embeds"):
        model.generate(inputs_embeds=torch.zeros(1, 2, 32), member_prompts={"anchor": [1]})
    with pytest.raises(ValueError, match="member_prompts need input_ids"):
        model.generate(member_prompts={"anchor": [1]})
    with pytest.raises(ValueError, match="member_prompts need input_ids"):
        model(member_prompts={"anchor": [1]})
    cache = model(torch.tensor([[1, 2]])).past_key_values
    with pytest.raises(ValueError, match="cannot be used with a KV cache that holds tokens"):
        model.generate(torch.tensor([[1, 2, 3]]), member_prompts={"anchor": [1]}, past_key_values=cache)
    with pytest.raises(ValueError, match="input_ids have 2 tokens, of which 2 are shared: none are left"):
        model(torch.tensor([[1, 2]]), member_prompts={"anchor": [1]}, logits_to_keep=3)


def test_no_prompts_are_as_none_given(pair):
    model, members = pair
    expected = reference(members, [0.5, 0.5], [PROMPTS, PROMPTS])
    assert torch.equal(generate(model, member_prompts={}, prefill_chunk_size=3), expected)
    inputs = left_padded(PROMPTS)
    assert torch.equal(model(**inputs, member_prompts={}).logits, model(**inputs).logits)


def test_auto_decoding_decodes_jointly(pair):
    model, members = pair
    expected = reference(members, [0.5, 0.5], [PROMPTS, OTHERS])
    assert torch.equal(generate(model, decoding="auto", member_prompts={"anchor": OTHERS}), expected)
