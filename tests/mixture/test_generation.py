"""`generate` of a mixture compared with a reference loop that shares none of its code.

The reference runs every member on each sequence alone, without cache, padding or batches, in float32, and mixes in
float64. It appends one token at a time to the whole batch, so seeded sampling uses the same random numbers.
"""

import itertools

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CompileConfig,
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
)

from logitmix.mixture.generation import GREEDY, generate_completions, get_eos_token_ids
from logitmix.mixture.modeling import LogitMixForCausalLM
from tests.helpers.members import PAD, VOCAB_SIZE, character_tokenizer, tiny_member

NEW_TOKENS = 8

PROMPTS = [[5, 17, 9, 33, 21, 8, 40], [12, 50, 7], [44, 3, 29, 18, 56]]


def left_padded(prompts):
    width = max(map(len, prompts))
    input_ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": input_ids, "attention_mask": mask}


@torch.no_grad()
def reference_next_logits(members, weights, scheme, sequence):
    """The mixture's logits `[V]` of the token after `sequence`, by the definition."""
    logits = [member(torch.tensor([sequence]), use_cache=False).logits[0, -1].double() for member in members]
    if scheme == "logit":
        return sum(w * z for w, z in zip(weights, logits, strict=True))
    return sum(w * z.softmax(-1) for w, z in zip(weights, logits, strict=True)).log()


def reference_generate(members, weights, prompts=PROMPTS, scheme="logit", temperature=None, new_tokens=NEW_TOKENS):
    """New tokens `[B, new_tokens]`; `weights` are `[K]` or one row per prompt. Greedy without a temperature."""
    rows = [weights] * len(prompts) if isinstance(weights[0], float) else weights
    sequences = [list(prompt) for prompt in prompts]
    for _ in range(new_tokens):
        logits = torch.stack(
            [reference_next_logits(members, row, scheme, s) for row, s in zip(rows, sequences, strict=True)]
        )
        if temperature is None:
            chosen = logits.argmax(-1)
        else:
            chosen = torch.multinomial((logits / temperature).softmax(-1).float(), num_samples=1).squeeze(1)
        for sequence, token in zip(sequences, chosen.tolist(), strict=True):
            sequence.append(token)
    return torch.tensor([s[len(prompt) :] for s, prompt in zip(sequences, prompts, strict=True)])


def generate(model, prompts=PROMPTS, **kwargs):
    """New tokens of the model, `[B, new_tokens]`."""
    inputs = left_padded(prompts)
    defaults = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": PAD}
    return model.generate(**inputs, **(defaults | kwargs))[:, inputs["input_ids"].shape[1] :]


def mixture(*architectures, scheme="logit", **kwargs):
    members = [tiny_member(architecture, seed=i) for i, architecture in enumerate(architectures)]
    return LogitMixForCausalLM.from_members(members[0], members[1:], scheme=scheme, **kwargs), members


@pytest.fixture(scope="module")
def pair():
    """Qwen2 with Llama, which differ in depth, width and number of heads."""
    return mixture("qwen2", "llama")


PAIRS = {
    "Qwen2 with itself at another seed": ("qwen2", "qwen2"),
    "Qwen2 with Llama": ("qwen2", "llama"),
    "sliding windows with full attention": ("qwen2-sliding", "llama"),
    "full attention with sliding windows": ("qwen2", "qwen2-sliding"),
    "soft-capped logits": ("gemma2", "llama"),
    "learned positions": ("gpt2", "qwen2"),
    "a mixture of experts": ("qwen2", "mixtral"),
}


@pytest.mark.parametrize("scheme", ["logit", "prob"])
@pytest.mark.parametrize("architectures", PAIRS.values(), ids=PAIRS.keys())
def test_greedy_tokens_match_the_reference(architectures, scheme):
    model, members = mixture(*architectures, scheme=scheme)
    expected = reference_generate(members, [0.6, 0.4], scheme=scheme)
    assert torch.equal(generate(model, alpha=0.4), expected)
    # the comparison would be vacuous if one member decided every token
    assert not torch.equal(expected, reference_generate(members, [1.0, 0.0]))
    assert not torch.equal(expected, reference_generate(members, [0.0, 1.0]))


@pytest.mark.parametrize("architectures", PAIRS.values(), ids=PAIRS.keys())
def test_static_cache_gives_the_same_tokens(architectures):
    model, members = mixture(*architectures)
    expected = reference_generate(members, [0.6, 0.4])
    assert torch.equal(generate(model, alpha=0.4, cache_implementation="static"), expected)


@pytest.mark.parametrize(
    "cache",
    [{"use_cache": False}, {"cache_implementation": "dynamic"}, {"cache_implementation": "offloaded"},
     {"prefill_chunk_size": 3}, {"prefill_chunk_size": 2, "cache_implementation": "static"}],
    ids=lambda kwargs: " ".join(f"{key}={value}" for key, value in kwargs.items()),
)  # fmt: skip
def test_every_cache_gives_the_same_tokens(cache):
    if cache.get("cache_implementation") == "offloaded" and not torch.cuda.is_available():
        pytest.skip("offloading needs an accelerator")
    model, members = mixture("qwen2-sliding", "llama")
    assert torch.equal(generate(model, alpha=0.4, **cache), reference_generate(members, [0.6, 0.4]))


@pytest.mark.parametrize("scheme", ["logit", "prob"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_seeded_samples_match_the_reference(pair, scheme, temperature):
    members = pair[1]
    model = LogitMixForCausalLM.from_members(members[0], members[1], scheme=scheme)
    torch.manual_seed(7)
    expected = reference_generate(members, [0.5, 0.5], scheme=scheme, temperature=temperature)
    torch.manual_seed(7)
    sampled = generate(model, do_sample=True, temperature=temperature, top_k=0, top_p=1.0)
    assert torch.equal(sampled, expected)
    assert not torch.equal(sampled, generate(model))


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("scheme", ["logit", "prob"])
def test_each_sequence_has_its_own_alpha(pair, scheme, cache):
    members = pair[1]
    model = LogitMixForCausalLM.from_members(members[0], members[1], scheme=scheme)
    expected = reference_generate(members, [[1.0, 0.0], [0.3, 0.7], [0.0, 1.0]], scheme=scheme)
    assert torch.equal(generate(model, alpha=[0.0, 0.7, 1.0], **cache), expected)
    assert torch.equal(generate(model, alpha=torch.tensor([0.0, 0.7, 1.0]), **cache), expected)


def test_three_members_and_negative_weights(pair):
    """DExperts and proxy tuning: z + (z_tuned - z_untuned)."""
    model, members = mixture("qwen2", "llama", "gpt2", weights=[1.0, 0.8, -0.6])
    assert torch.equal(generate(model), reference_generate(members, [1.0, 0.8, -0.6]))
    rows = [[1.0, 0.0, 0.0], [0.2, 0.3, 0.5], [0.0, 2.0, -1.0]]
    assert torch.equal(generate(model, weights=rows), reference_generate(members, rows))
    assert torch.equal(generate(model, weights=[0.0, 0.5, 0.5]), reference_generate(members, [0.0, 0.5, 0.5]))


def test_returned_sequences_keep_their_own_weights(pair):
    model, members = pair
    rows = [[1.0, 0.0], [0.5, 0.5], [0.1, 0.9]]
    repeated_rows, repeated_prompts = ([x for x in xs for _ in range(2)] for xs in (rows, PROMPTS))
    torch.manual_seed(3)
    expected = reference_generate(members, repeated_rows, repeated_prompts, temperature=1.0)
    torch.manual_seed(3)
    sampled = generate(
        model, weights=torch.tensor(rows), do_sample=True, top_k=0, temperature=1.0, num_return_sequences=2
    )
    assert torch.equal(sampled, expected)


@pytest.mark.parametrize("scheme", ["logit", "prob"])
def test_exhaustive_beam_search_finds_the_most_probable_sequences(scheme):
    V, length = 6, 3
    members = [tiny_member("qwen2", 0, vocab_size=V), tiny_member("llama", 1, vocab_size=V)]
    model = LogitMixForCausalLM.from_members(*members, alpha=0.3, scheme=scheme)
    prompt = [2, 4, 1]

    def log_prob(continuation):
        total = 0.0
        for t, token in enumerate(continuation):
            logits = reference_next_logits(members, [0.7, 0.3], scheme, prompt + list(continuation[:t]))
            total += logits.log_softmax(-1)[token].item()
        return total

    log_probs = {y: log_prob(y) for y in itertools.product(range(V), repeat=length)}
    best = sorted(log_probs, key=log_probs.get, reverse=True)[:3]
    # with as many beams as prefixes, nothing is pruned
    found = generate(
        model, [prompt], num_beams=V ** (length - 1), num_return_sequences=3, max_new_tokens=length, length_penalty=0.0
    )
    assert [tuple(y) for y in found.tolist()] == best


@pytest.mark.parametrize("architectures", [("qwen2", "llama"), ("qwen2-sliding", "gpt2")], ids="-".join)
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_beam_search_reorders_the_caches_of_all_members(architectures, cache):
    model, _ = mixture(*architectures)
    kwargs = {"num_beams": 3, "num_return_sequences": 2, "alpha": [0.2, 0.5, 0.8]}
    assert torch.equal(generate(model, **kwargs, **cache), generate(model, **kwargs, use_cache=False))


def test_stop_string_ends_generation_where_it_first_appears():
    tokenizer = character_tokenizer()
    assert len(tokenizer) == VOCAB_SIZE
    model, members = mixture("qwen2", "llama")
    prompt = tokenizer("abc=")["input_ids"]
    text = tokenizer.decode(reference_generate(members, [0.5, 0.5], [prompt], new_tokens=12)[0])
    stop = text[4:6]
    generated = generate(model, [prompt], max_new_tokens=12, stop_strings=[stop], tokenizer=tokenizer)[0]
    assert tokenizer.decode(generated) == text[: text.index(stop) + len(stop)] != text


def test_finished_sequences_are_padded(pair):
    model, members = pair
    full = reference_generate(members, [0.5, 0.5])
    eos = full[1, 2].item()
    generated = generate(model, eos_token_id=eos)
    for row, expected in zip(generated.tolist(), full.tolist(), strict=True):
        if eos in expected:
            length = expected.index(eos) + 1
            expected = expected[:length] + [PAD] * (len(row) - length)
        assert row == expected


def test_logits_processors_see_the_mixed_logits(pair):
    model, members = pair
    seen = []

    class Record(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(scores[0])
            return scores

    generate(model, PROMPTS[:1], alpha=0.4, max_new_tokens=1, logits_processor=LogitsProcessorList([Record()]))
    expected = reference_next_logits(members, [0.6, 0.4], "logit", PROMPTS[0])
    torch.testing.assert_close(seen[0].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architectures", [("qwen2", "llama"), ("qwen2-sliding", "gemma2")], ids="-".join)
@pytest.mark.parametrize("weights", [{}, {"alpha": 0.3}, {"weights": [[0.7, 0.3]]}], ids=str)
def test_prompt_lookup_decoding_gives_the_greedy_tokens(architectures, weights):
    model, _ = mixture(*architectures)
    prompt = [[5, 17, 9, 33, 5, 17, 9]]
    greedy = generate(model, prompt, max_new_tokens=16, **weights)
    assert torch.equal(generate(model, prompt, max_new_tokens=16, prompt_lookup_num_tokens=3, **weights), greedy)


@pytest.mark.parametrize("weights", [{}, {"alpha": 0.3}, {"weights": [[0.7, 0.3]]}], ids=str)
def test_assisted_decoding_gives_the_greedy_tokens(pair, weights):
    model, members = pair
    greedy = generate(model, PROMPTS[:1], max_new_tokens=12, **weights)
    for assistant in (tiny_member("qwen2", seed=5), members[0]):
        assert torch.equal(
            generate(model, PROMPTS[:1], max_new_tokens=12, assistant_model=assistant, **weights), greedy
        )


def test_a_compiled_step_on_a_static_cache_gives_the_same_tokens(pair):
    """On a GPU `generate` compiles the step automatically with a static cache; here it is forced to."""
    model, members = pair
    compile_config = CompileConfig(backend="eager", mode=None)
    compile_config._compile_all_devices = True
    expected = reference_generate(members, [0.6, 0.4], PROMPTS[:1])
    compiled = generate(model, PROMPTS[:1], alpha=0.4, cache_implementation="static", compile_config=compile_config)
    assert torch.equal(compiled, expected)
    assert hasattr(model, "_compiled_call")


def test_generation_continues_from_a_given_cache(pair):
    model, members = pair
    prompt = torch.tensor(PROMPTS[:1])
    for cache in (DynamicCache(config=model.config), DynamicCache(), StaticCache(model.config, max_cache_len=32)):
        first = model.generate(prompt, max_new_tokens=4, do_sample=False, past_key_values=cache)
        both = model.generate(first, max_new_tokens=4, do_sample=False, past_key_values=cache)
        assert torch.equal(both[:, prompt.shape[1] :], reference_generate(members, [0.5, 0.5], PROMPTS[:1]))


# --- members of weight 0 --------------------------------------------------------------------------------------------


class Calls:
    """Counts the forward calls of each member."""

    def __init__(self, model):
        self.counts = dict.fromkeys(model.config.members, 0)
        self.handles = [
            getattr(model, name).register_forward_pre_hook(lambda *_, name=name: self.add(name))
            for name in self.counts
        ]

    def add(self, name):
        self.counts[name] += 1

    def __enter__(self):
        return self.counts

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("per_sequence", [False, True], ids=["for the batch", "a row each"])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_member_of_weight_0_for_all_sequences_does_not_run(pair, alpha, per_sequence, cache):
    model, members = pair
    with Calls(model) as calls:
        generated = generate(model, alpha=[alpha] * len(PROMPTS) if per_sequence else alpha, **cache)
    skipped, run = ("anchor_0", "policy") if alpha == 0 else ("policy", "anchor_0")
    assert calls[skipped] == 0
    assert calls[run] == NEW_TOKENS
    assert torch.equal(generated, generate(members[int(alpha)]))


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.parametrize(("before", "late"), [(0.0, "anchor_0"), (1.0, "policy")])
def test_a_cache_without_the_tokens_of_a_skipped_member_is_rejected(pair, kind, before, late):
    model = pair[0]
    cache = DynamicCache(config=model.config) if kind is DynamicCache else StaticCache(model.config, max_cache_len=16)
    prompt = torch.tensor(PROMPTS[:1])
    model(prompt, past_key_values=cache, use_cache=True, alpha=before)
    with pytest.raises(ValueError, match=f"has 0 tokens of {late}, but 7 precede this step"):
        model(prompt[:, :1], past_key_values=cache, use_cache=True, alpha=0.5)


@pytest.fixture
def pair_with_other_ends(tmp_path):
    """Folders of members that end texts with other tokens: the policy with 2, the anchor with 2 and 7."""
    for name, seed, ends in (("policy", 0, 2), ("anchor", 1, [2, 7])):
        member = tiny_member("qwen2", seed)
        member.generation_config.eos_token_id = ends
        member.save_pretrained(tmp_path / name)
        tokenizer = character_tokenizer()
        tokenizer.eos_token = "a" if name == "anchor" else tokenizer.eos_token
        tokenizer.save_pretrained(tmp_path / name)
    return tmp_path / "policy", tmp_path / "anchor"


def test_a_mixture_ends_where_any_member_does(pair_with_other_ends, tmp_path):
    """At alpha 1 its completions are the anchor's: cut at the anchor's declared end and at its tokenizer's EOS."""
    policy, anchor = pair_with_other_ends
    mixture = LogitMixForCausalLM.from_members(policy, anchor)
    a = mixture.tokenizer.convert_tokens_to_ids("a")
    assert set(mixture.generation_config.eos_token_id) == {2, 7, a}
    mixture.save_pretrained(tmp_path / "mixture")
    loaded = LogitMixForCausalLM.from_pretrained(tmp_path / "mixture")
    for model in (mixture, loaded):
        assert set(get_eos_token_ids(model, model.tokenizer)) == {2, 7, a}
    alone = AutoModelForCausalLM.from_pretrained(anchor)
    prompts = [[5 + i, 6, 40 - i] for i in range(12)]
    settings = GREEDY | {"max_new_tokens": 30}
    at_1 = generate_completions(mixture, mixture.tokenizer, prompts, settings, alpha=1.0)
    assert at_1 == generate_completions(alone, AutoTokenizer.from_pretrained(anchor), prompts, settings)
    assert any(len(ids) < 30 for ids in at_1)


def test_a_checkpoint_that_names_the_policys_ends_only_still_ends_where_its_anchor_does(pair_with_other_ends):
    mixture = LogitMixForCausalLM.from_members(*pair_with_other_ends)
    mixture.generation_config.eos_token_id = 2  # as saved by 0.1.0
    mixture.anchors[0].generation_config.eos_token_id = [2, 7]
    assert set(get_eos_token_ids(mixture, mixture.tokenizer)) == {2, 7}
