"""Methods whose members differ in their prompts, against loops without a cache and against transformers' own."""

import pytest
import torch

from logitmix.mixture.modeling import LogitMixForCausalLM
from tests.helpers.members import PAD, tiny_member
from tests.mixture.test_generation import NEW_TOKENS, PROMPTS, generate, left_padded
from tests.mixture.test_member_prompts import OTHERS

DOCUMENTS = [[22, 23, 24, 25, 26, 27, 28, 29], [30, 31, 32], [33, 34, 35, 36, 37]]


def two_prompt_loop(member, own, other, combine, new_tokens=NEW_TOKENS):
    """Greedy tokens of one model under `combine` of the log-probabilities after `own` and after `other`."""
    rows = []
    for first, second in zip(own, other, strict=True):
        new = []
        for _ in range(new_tokens):
            with torch.no_grad():
                a, b = (member(torch.tensor([ids + new])).logits[0, -1].log_softmax(-1) for ids in (first, second))
            new.append(int(combine(a, b).argmax()))
        rows.append(new)
    return torch.tensor(rows)


@pytest.mark.parametrize("scale", [1.5, 3.0, 0.5])
@pytest.mark.parametrize(
    "settings", [{}, {"do_sample": True}, {"num_return_sequences": 2, "do_sample": True}], ids=str
)
def test_classifier_free_guidance_is_that_of_transformers(scale, settings):
    """`log p(v|n) + s (log p(v|x) - log p(v|n))` with a negative prompt n (Sanchez et al. 2023, arXiv 2306.17806).

    transformers runs the model a second time in a logits processor, with a second cache.
    """
    member = tiny_member("qwen2")
    model = LogitMixForCausalLM.from_members(member, member, weights=[scale, 1 - scale])
    negative, copies = left_padded(OTHERS), settings.get("num_return_sequences", 1)
    torch.manual_seed(5)
    inputs = left_padded(PROMPTS)
    expected = member.generate(
        **inputs, **({"do_sample": False} | settings), max_new_tokens=NEW_TOKENS, pad_token_id=PAD,
        guidance_scale=scale,
        negative_prompt_ids=negative["input_ids"].repeat_interleave(copies, 0), top_k=0,
        negative_prompt_attention_mask=negative["attention_mask"].repeat_interleave(copies, 0),
    )[:, inputs["input_ids"].shape[1] :]  # fmt: skip
    torch.manual_seed(5)
    assert torch.equal(generate(model, member_prompts={"anchor": negative}, top_k=0, **settings), expected)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_context_aware_decoding(alpha):
    """`softmax((1 + a) z(v | c, x) - a z(v | x))`, c the document (Shi et al. 2023, arXiv 2305.14739)."""
    member = tiny_member("llama")
    model = LogitMixForCausalLM.from_members(member, member, alpha=-alpha)
    with_document = [document + question for document, question in zip(DOCUMENTS, PROMPTS, strict=True)]
    expected = two_prompt_loop(member, with_document, PROMPTS, lambda a, b: (1 + alpha) * a - alpha * b)
    assert torch.equal(generate(model, with_document, member_prompts={"anchor": PROMPTS}), expected)
    # the document may as well be the policy's own prompt, so that the output begins with the question
    assert torch.equal(generate(model, PROMPTS, member_prompts={"policy": with_document}), expected)


@pytest.mark.parametrize("a", [0.3, 1.0])
def test_the_teacher_of_self_distillation_reads_the_feedback(a):
    """`q* ∝ q_ref(y_t | x, y_<t)^(1-a) q(y_t | x, f, y_<t)^a` over a whole answer y (arXiv 2605.20555, eq. 11)."""
    policy, reference = tiny_member("qwen2"), tiny_member("qwen2", seed=1)
    model = LogitMixForCausalLM.from_members(policy, reference, alpha=1 - a)
    answers = [[41, 42, 43], [44, 45, 46], [47, 48, 49]]
    with_feedback = [prompt + feedback for prompt, feedback in zip(PROMPTS, DOCUMENTS, strict=True)]
    inputs = left_padded([x + y for x, y in zip(PROMPTS, answers, strict=True)])
    with torch.no_grad():
        teacher = model(**inputs, member_prompts={"policy": with_feedback}, logits_to_keep=4).logits.log_softmax(-1)
        for i, (x, xf, y) in enumerate(zip(PROMPTS, with_feedback, answers, strict=True)):
            q, q_ref = (
                m(torch.tensor([ids + y])).logits[0, -4:].double().log_softmax(-1)
                for m, ids in ((policy, xf), (reference, x))
            )
            expected = (a * q + (1 - a) * q_ref).log_softmax(-1)
            torch.testing.assert_close(teacher[i].double(), expected, atol=1e-4, rtol=1e-4)
