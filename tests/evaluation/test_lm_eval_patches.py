"""What lm-evaluation-harness scores of each preset, and the contract with it, at the level of its class for models."""

import pytest
import torch

from logitmix.presets import contrastive_decoding, dexperts, ensemble, guidance, proxy_tuning
from tests.helpers.contracts import assert_has, assert_parameters, assert_source_has
from tests.helpers.members import character_tokenizer, tiny_member

pytest.importorskip("lm_eval", reason="pip install lm-eval to test the mixture in lm-evaluation-harness")
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM

from logitmix.evaluation import lm_eval_patches as patches

MEMBERS = [tiny_member("gpt2", 0), tiny_member("llama", 1), tiny_member("qwen2", 2)]
NEGATIVE = [7, 21, 5, 40, 9]
PAIRS = [("a+b=", "cd"), ("x", "yz0123"), ("what is 7+8?", "1"), ("abc", "d"), ("ba", "cd")]


def log_p(member, ids):
    with torch.no_grad():
        return member(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)


def weighted(*weights):
    return lambda context, ids: sum(w * log_p(m, context + ids) for w, m in zip(weights, MEMBERS, strict=False))


def pool(context, ids):
    return (0.25 * log_p(MEMBERS[0], context + ids).exp() + 0.75 * log_p(MEMBERS[1], context + ids).exp()).log()


def plausible(context, ids):
    expert = log_p(MEMBERS[0], context + ids)
    return weighted(1.5, -0.5)(context, ids).masked_fill(expert.exp() < 0.01 * expert.exp().max(), -torch.inf)


def guided(context, ids):
    on_context, on_negative = (log_p(MEMBERS[0], start + ids) for start in (context, NEGATIVE))
    return on_negative + 2.5 * (on_context - on_negative)


PRESETS = {
    "dexperts": (lambda: dexperts(*MEMBERS), weighted(1, 2, -2)),
    "proxy_tuning": (lambda: proxy_tuning(*MEMBERS), weighted(1, 1, -1)),
    "contrastive_decoding": (lambda: contrastive_decoding(*MEMBERS[:2], plausibility=0.01), plausible),
    "ensemble": (lambda: ensemble(MEMBERS), weighted(1 / 3, 1 / 3, 1 / 3)),
    "ensemble prob": (lambda: ensemble(MEMBERS[:2], [0.25, 0.75], "prob"), pool),
    "guidance": (lambda: guidance(MEMBERS[0], NEGATIVE, 2.5), guided),
}


def harness(model, **kwargs):
    patches.score_with_member_prompts()
    return HFLM(pretrained=model.eval(), tokenizer=character_tokenizer(), **({"batch_size": 3} | kwargs))


def expected(equation, context, continuation):
    """The log-likelihood, and whether the continuation is greedy, token by token without a cache."""
    total, is_greedy = 0.0, True
    for i, token in enumerate(continuation):
        log_p_V = equation(context, continuation[:i]).log_softmax(-1)
        total, is_greedy = total + float(log_p_V[token]), is_greedy and int(log_p_V.argmax()) == token
    return total, is_greedy


def instances(kind, *arguments):
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


@pytest.mark.parametrize("name", PRESETS)
def test_log_likelihoods_are_those_of_the_papers_equation(name):
    build, equation = PRESETS[name]
    lm = harness(build())
    found = lm.loglikelihood(instances("loglikelihood", *PAIRS), disable_tqdm=True)
    for texts, (total, is_greedy) in zip(PAIRS, found, strict=True):
        right, right_is_greedy = expected(equation, *map(lm.tok_encode, texts))
        assert (total, is_greedy) == (pytest.approx(right, abs=1e-4), right_is_greedy)


def test_a_greedy_continuation_of_guidance_is_known_as_such():
    lm = harness(guidance(MEMBERS[0], NEGATIVE, 2.5))
    context = lm.tok_encode("a+b=")
    completion = lm.model.generate(torch.tensor([context]), max_new_tokens=4, do_sample=False)[0, len(context) :]
    text = lm.tok_decode(completion.tolist())
    pairs = instances("loglikelihood", ("a+b=", text), ("a+b=", text[:-1] + "a"))
    assert [is_greedy for _, is_greedy in lm.loglikelihood(pairs, disable_tqdm=True)] == [True, text[-1] == "a"]


def test_a_text_is_scored_after_the_negative_prompt_in_windows():
    lm = harness(guidance(MEMBERS[0], NEGATIVE, 2.5), max_length=6)
    lm.model.config.set_member_prompts({"anchor": NEGATIVE[:1]})
    ids = lm.tok_encode("what is 7+8")
    (found,) = lm.loglikelihood_rolling(instances("loglikelihood_rolling", ("what is 7+8",)), disable_tqdm=True)
    windows = [([lm.prefix_token_id], ids[:6]), (ids[4:6], ids[6:])]  # of 6 tokens read

    def equation(context, tokens):
        on_context, on_negative = (log_p(MEMBERS[0], start + tokens) for start in (context, NEGATIVE[:1]))
        return on_negative + 2.5 * (on_context - on_negative)

    assert found == pytest.approx(sum(expected(equation, *window)[0] for window in windows), abs=1e-4)


def test_results_are_cached_by_their_texts():
    lm, cached = harness(guidance(MEMBERS[0], NEGATIVE, 2.5)), {}
    lm.cache_hook.add_partial = lambda kind, texts, answer: cached.update({(kind, *texts): answer})
    found = lm.loglikelihood(instances("loglikelihood", *PAIRS), disable_tqdm=True)
    assert cached == {("loglikelihood", *texts): answer for texts, answer in zip(PAIRS, found, strict=True)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 9}, "a continuation has 6 tokens, but the prompt of anchor_0 leaves 5 .* pass max_length=5"),
        ({"batch_size": "auto"}, "batch_size is auto, but a mixture with prompts of its members needs a number"),
    ],
)
def test_what_cannot_be_scored_is_refused(options, message):
    lm = harness(guidance(MEMBERS[0], NEGATIVE, 2.5), **options)
    with pytest.raises(ValueError, match=message):
        lm.loglikelihood(instances("loglikelihood", *PAIRS), disable_tqdm=True)


def test_the_harness_scores_every_log_likelihood_by_the_methods_that_are_replaced():
    assert_has("lm_eval", HFLM, "_loglikelihood_tokens", "_detect_batch_size", "max_length", "batch_size", "model")
    assert_parameters("lm_eval", patches._hflm_log_likelihoods, "self", "requests", "disable_tqdm", "override_bs")
    assert_source_has("lm_eval", HFLM.loglikelihood_rolling, "self._loglikelihood_tokens(", "_detect_batch_size()")
    assert_source_has("lm_eval", TemplateLM.loglikelihood, "self._loglikelihood_tokens(")
    lm = harness(ensemble(MEMBERS))
    assert_has("lm_eval", lm, "rank", "device", "mixed_precision_dtype", "softmax_dtype", "cache_hook")
