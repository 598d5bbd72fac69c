"""The decode-time methods by name, against uncached loops in float32 that follow the papers' equations."""

import json

import numpy as np
import pytest
import torch

from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.mixture.presets import PRESETS
from logitmix.presets import contrastive_decoding, dexperts, ensemble, guidance, proxy_tuning
from tests.helpers.members import INPUT, VOCAB_SIZE, character_tokenizer, tiny_member

MEMBERS = [tiny_member("qwen2", 0), tiny_member("llama", 1), tiny_member("gpt2", 2)]
NEW = 6


def log_p(member, row):
    """Log-probabilities of the next token, in float32."""
    with torch.no_grad():
        return member(input_ids=row[None]).logits[0, -1].float().log_softmax(-1)


def plausible(log_p_expert, threshold):
    return log_p_expert.exp() >= threshold * log_p_expert.exp().max()


def li(row, threshold=0.1):
    expert, amateur = (log_p(member, row) for member in MEMBERS[:2])
    return torch.where(plausible(expert, threshold), expert - amateur, -torch.inf)


def obrien_and_lewis(row, beta, threshold=0.1):
    expert, amateur = (log_p(member, row) for member in MEMBERS[:2])
    return torch.where(plausible(expert, threshold), (1 + beta) * expert - beta * amateur, -torch.inf)


def dexperts_equation(row, alpha):
    base, expert, antiexpert = (log_p(member, row) for member in MEMBERS)
    return base + alpha * (expert - antiexpert)


def product(row, weights):
    return sum(w * log_p(member, row) for w, member in zip(weights, MEMBERS, strict=True))


def pool(row, weights):
    return sum(w * log_p(member, row).exp() for w, member in zip(weights, MEMBERS, strict=True)).log()


CASES = {
    "dexperts": (lambda: dexperts(*MEMBERS, alpha=1.5), lambda row: dexperts_equation(row, 1.5)),
    "proxy tuning": (lambda: proxy_tuning(*MEMBERS), lambda row: dexperts_equation(row, 1.0)),
    "contrastive decoding": (
        lambda: contrastive_decoding(*MEMBERS[:2], alpha=0.7),
        lambda r: obrien_and_lewis(r, 0.7),
    ),
    "its cut alone": (
        lambda: contrastive_decoding(*MEMBERS[:2], alpha=3, plausibility=0.6),
        lambda row: obrien_and_lewis(row, 3, 0.6),
    ),
    "the original": (lambda: contrastive_decoding(*MEMBERS[:2], alpha=None), li),
    "without a cut": (
        lambda: contrastive_decoding(*MEMBERS[:2], alpha=0.7, plausibility=None),
        lambda row: obrien_and_lewis(row, 0.7, 0.0),
    ),
    "a product": (lambda: ensemble(MEMBERS), lambda row: product(row, [1 / 3] * 3)),
    "a product of other weights": (lambda: ensemble(MEMBERS, [1, 0.5, 2]), lambda row: product(row, [1, 0.5, 2])),
    "a pool": (lambda: ensemble(MEMBERS, [0.2, 0.3, 0.5], "prob"), lambda row: pool(row, [0.2, 0.3, 0.5])),
}


@pytest.fixture(params=CASES)
def case(request):
    build, equation = CASES[request.param]
    return build().eval(), equation


def rows():
    return [ids[mask.bool()] for ids, mask in zip(INPUT["input_ids"], INPUT["attention_mask"], strict=True)]


def test_the_next_token_has_the_papers_distribution(case):
    model, equation = case
    for row in rows():
        with torch.no_grad():
            mixed = model(row[None]).logits[0, -1]
        torch.testing.assert_close(mixed.softmax(-1), equation(row).softmax(-1), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_follows_an_uncached_loop(case, cache):
    model, equation = case
    options = {} if cache == "dynamic" else {"cache_implementation": "static", "disable_compile": True}
    found = model.generate(**INPUT, max_new_tokens=NEW, do_sample=False, **options)[:, INPUT["input_ids"].shape[1] :]
    for completion, row in zip(found, rows(), strict=True):
        for token in completion:
            assert token == equation(row).argmax()
            row = torch.cat([row, token[None]])


def test_a_saved_preset_is_the_same_mixture(case, tmp_path):
    model, _ = case
    model.save_pretrained(tmp_path)
    loaded = LogitMixForCausalLM.from_pretrained(tmp_path).eval()
    assert (loaded.config.plausibility, loaded.config.weights) == (model.config.plausibility, model.config.weights)
    with torch.no_grad():
        assert torch.equal(loaded(**INPUT).logits, model(**INPUT).logits)


def test_presets_are_built_from_folders(tmp_path):
    tokenizer, folders = character_tokenizer(), []
    assert len(tokenizer) == VOCAB_SIZE
    for i, member in enumerate(MEMBERS):
        folders.append(str(tmp_path / str(i)))
        member.save_pretrained(folders[-1])
        tokenizer.save_pretrained(folders[-1])
    model = dexperts(*folders, alpha=1.5, dtype="float32")
    assert model.tokenizer is not None
    with torch.no_grad():
        torch.testing.assert_close(model(**INPUT).logits, dexperts(*MEMBERS, alpha=1.5)(**INPUT).logits)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: dexperts(*MEMBERS, alpha=-1),
            r"alpha is -1, but dexperts takes .* 0: its weights are 1, \+alpha, -alpha",
        ),
        (lambda: proxy_tuning(*MEMBERS, alpha=float("nan")), "alpha is nan, but proxy_tuning takes"),
        (
            lambda: contrastive_decoding(*MEMBERS[:2], alpha=-0.5),
            "weights are 1 [+] alpha, -alpha for expert, amateur",
        ),
        (lambda: contrastive_decoding(*MEMBERS[:2], alpha="0.5"), "alpha is '0.5', but contrastive_decoding takes"),
        (lambda: ensemble(MEMBERS, [1, 1, -1]), r"weights are \[1, 1, -1\], but those of an ensemble are at least 0"),
        (lambda: ensemble(MEMBERS, [0, 0, 0]), "not all 0"),
        (lambda: ensemble(MEMBERS, [float("nan"), 1, 1]), "weights are not finite"),
        (lambda: ensemble(MEMBERS, [1, 1]), "for 3 members"),
        (lambda: ensemble(MEMBERS, [1, 1, 1], "prob"), "scheme 'prob' needs weights >= 0 that sum to 1"),
        (lambda: ensemble(MEMBERS, ["1", "2", "3"]), r"weights are \['1', '2', '3'\], but must be numbers"),
        (lambda: ensemble(MEMBERS, [1, None, 1]), r"weights are \[1, None, 1\], but must be numbers"),
        (lambda: ensemble(MEMBERS, "abc"), "weights are 'abc', but must be numbers"),
        (lambda: ensemble(MEMBERS, {"policy": 1}), "weights are {'policy': 1}, but must be numbers"),
        (lambda: ensemble(MEMBERS[0]), "an ensemble is a list of at least 2 members, got a Qwen2ForCausalLM"),
        (lambda: ensemble(MEMBERS[:1]), "at least 2 members, got 1"),
        (lambda: ensemble("folder"), "is a list of at least 2 members, got 'folder'"),
        (
            lambda: dexperts(*MEMBERS, weights=[1, -1, 1]),
            r"dexperts takes alpha, not weights: its weights are 1, \+alpha, -alpha for base, expert, antiexpert",
        ),
        (
            lambda: contrastive_decoding("never", "loaded", alpha=None, weights=[-1, 1]),
            "contrastive_decoding takes alpha, not weights: its weights are 1 [+] alpha, -alpha",
        ),
    ],
)
def test_weights_that_are_not_the_methods_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("threshold", [0, -0.1, 1.01, float("nan"), "0.1", True])
def test_a_plausibility_outside_its_range_is_refused(threshold):
    message = f"plausibility is {threshold!r}, but must be above 0 and at most 1"
    with pytest.raises(ValueError, match=message):
        contrastive_decoding("never", "loaded", plausibility=threshold)
    config = contrastive_decoding(*MEMBERS[:2]).config
    with pytest.raises(ValueError, match=message):
        config.set_plausibility(threshold)
    assert config.plausibility == 0.1


def test_numbers_of_numpy_are_numbers():
    assert dexperts(*MEMBERS, alpha=np.float32(1.5)).config.weights == [1, 1.5, -1.5]
    assert ensemble(MEMBERS[:2], np.array([1, 2])).config.weights == [1, 2]
    config = contrastive_decoding(*MEMBERS[:2], plausibility=np.float32(0.25)).config
    assert json.loads(config.to_json_string())["plausibility"] == 0.25


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: contrastive_decoding(*MEMBERS[:2], beta=0.7),
            "beta=0.7 has no effect: it is an argument for loading",
        ),
        (lambda: guidance(MEMBERS[0], [5], guidance_scale=3), "guidance_scale=3 has no effect"),
        (lambda: ensemble(MEMBERS, attn_implementation="eager"), "attn_implementation='eager' has no effect"),
        (
            lambda: ensemble(MEMBERS, dtype="bfloat16"),
            "dtype of policy is bfloat16, but it is a loaded model in float32",
        ),
        (
            lambda: guidance(MEMBERS[0], [5], alpha=0.3),
            "guidance takes scale, not alpha: its weights are scale, 1 - scale",
        ),
        (lambda: guidance(5, [5]), "a member must be a model of transformers, a folder or a hub id, got int"),
    ],
)
def test_arguments_without_effect_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_the_dtype_of_loaded_models_may_be_stated():
    for dtype in ("float32", torch.float32, "auto", None):
        assert ensemble(MEMBERS[:2], dtype=dtype).policy is MEMBERS[0]


def test_a_negative_weight_is_refused_with_the_scheme_prob():
    with pytest.raises(ValueError, match="scheme 'prob' needs weights >= 0"):
        dexperts(*MEMBERS, scheme="prob")


def test_the_negative_of_alpha_is_the_mixtures_alpha():
    model = contrastive_decoding(*MEMBERS[:2], alpha=0.7, plausibility=None)
    assert model.alpha == -0.7
    assert model.config.weights == PRESETS["contrastive_decoding"].weights(0.7)
