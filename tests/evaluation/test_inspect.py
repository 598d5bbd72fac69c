"""Inspection of a response: probabilities, the member that carried each token, the table and the page."""

import re

import pytest
import torch

from logitmix.cli.__main__ import main
from logitmix.evaluation.inspect import inspect
from logitmix.evaluation.report.pages import inspection_page
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.paper.tiny_model import character_tokenizer as quickstart_tokenizer
from logitmix.paper.tiny_model import tiny_model
from logitmix.presets import contrastive_decoding, dexperts, ensemble, guidance
from logitmix.tasks import Arithmetic
from tests.helpers.adapters import lora
from tests.helpers.browser import ParsedPage, assert_self_contained, page_in_chromium
from tests.helpers.members import character_tokenizer, tiny_member

NEGATIVE = [7, 21, 5]
QUESTION = '<script>alert(1)</script> & "2<3"?'


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer()


def build(kind):
    qwen, llama, gpt2 = tiny_member("qwen2", seed=1), tiny_member("llama", seed=2), tiny_member("gpt2", seed=3)
    if kind == "adapters":  # the anchor is the policy's model without its adapter
        return LogitMixForCausalLM.from_members(qwen, qwen, alpha=0.45, peft_config=lora(init_lora_weights=False))
    presets = {
        "dexperts": lambda: dexperts(qwen, llama, gpt2, alpha=0.7),
        "specialists": lambda: ensemble([qwen, llama, gpt2], [0.4, 0.3, 0.3], "prob"),
        "contrastive": lambda: contrastive_decoding(qwen, llama, alpha=None, plausibility=1e-4),
        "guidance": lambda: guidance(gpt2, NEGATIVE, 1.5),
    }
    if kind in presets:
        return presets[kind]()
    return LogitMixForCausalLM.from_members(qwen, llama, alpha=0.45, scheme=kind)


@pytest.fixture(
    scope="module", params=["logit", "prob", "adapters", "dexperts", "specialists", "contrastive", "guidance"]
)
def inspected(request, tokenizer):
    """A mixture, and the longest of its inspected responses to several prompts (some end early)."""
    model = build(request.param).eval()
    prompts = ("a<b&", "<", "&?", "x+y", "7") if request.param in ("logit", "prob", "adapters") else ("<", "7")
    inspections = [inspect(model, tokenizer, prompt, max_new_tokens=40) for prompt in prompts]
    return model, max(inspections, key=lambda inspection: len(inspection.tokens))


def softmax64(logits):
    return torch.softmax(logits.double(), dim=-1)


def test_probabilities_match_each_model_run_on_each_prefix(inspected, tokenizer):
    """Each member runs on each prefix without cache; mixing is eq. 1 or its arithmetic form, in float64."""
    model, inspection = inspected
    names = ["policy", "anchor"] if len(model.config.members) == 2 else model.config.members
    weights = torch.tensor(model.config.weights, dtype=torch.float64)
    assert dict(inspection.weights) == dict(zip(names, model.config.weights, strict=True))
    prompt_ids = tokenizer([inspection.prompt])["input_ids"][0]
    text = {tokenizer.decode([i]): i for i in range(model.config.vocab_size)}
    ids: list[int] = []
    for token in inspection.tokens:
        members = []
        for name in model.config.members:
            prefix = torch.tensor([model.config.member_prompts.get(name, prompt_ids) + ids])
            with torch.no_grad(), model.as_member(name) as member:
                members.append(member(prefix).logits[0, -1].double())
        if model.config.scheme == "logit":
            mixed = (weights[:, None] * torch.stack(members)).sum(0)
            if model.config.plausibility is not None:
                policy = softmax64(members[0])
                mixed[policy < model.config.plausibility * policy.max()] = -torch.inf
            mixture = softmax64(mixed)
        else:
            mixture = (weights[:, None] * softmax64(torch.stack(members))).sum(0)
        expected = dict(zip([*names, "mixture"], (*map(softmax64, members), mixture), strict=True))
        written = text[token.text]
        assert written == int(mixture.argmax())
        assert list(expected) == list(token.probabilities)
        for name, p_V in expected.items():
            assert token.probabilities[name] == pytest.approx(float(p_V[written]), abs=1e-5)
            values, indices = p_V.topk(5)
            assert [text[candidate.text] for candidate in token.top[name]] == indices.tolist()
            assert [candidate.probability for candidate in token.top[name]] == pytest.approx(values.tolist(), abs=1e-5)
        assert token.first_of == tuple(name for name in names if int(expected[name].argmax()) == written)
        words = {0: "none", 3: "all"} if len(names) == 3 else {0: "neither", 2: "both"}
        alone = token.first_of[0] if len(token.first_of) == 1 else "several"
        assert token.carried_by == words.get(len(token.first_of), alone)
        ids.append(written)
    assert sum(inspection.carried().values()) == len(inspection.tokens) > 15
    if min(inspection.weights.values()) > 0:
        assert sum(inspection.carried()[name] > 0 for name in names) > 1, "the test covers several"


def test_responses_match_those_of_each_model_alone(inspected, tokenizer):
    model, inspection = inspected
    prompt = torch.tensor(tokenizer([inspection.prompt])["input_ids"])
    for i, name in enumerate(inspection.weights):
        weights = [float(i == k) for k in range(len(inspection.weights))]
        ids = model.generate(prompt, weights=weights, max_new_tokens=40, do_sample=False, eos_token_id=2)[
            0, prompt.shape[1] :
        ]
        assert inspection.responses[name] == tokenizer.decode(ids, skip_special_tokens=True)
    assert inspection.responses["mixture"] == "".join(
        token.text for token in inspection.tokens if token.text not in ("<pad>", "<bos>", "<eos>")
    )


def test_the_page_escapes_text_and_is_self_contained(inspected):
    _, inspection = inspected
    names = ["<b>policy</b>", "anchor & co", "another"][: len(inspection.weights)]
    html = inspection_page(inspection, QUESTION, *names)
    assert_self_contained(html)
    parsed = ParsedPage(html)
    for shown in (QUESTION, *names, *inspection.responses.values()):
        assert shown in parsed.text
    assert len(re.findall(r'class="panel"', html)) == len(inspection.tokens)


def test_the_page_in_a_browser(inspected, tmp_path):
    _, inspection = inspected
    path = tmp_path / "page.html"
    path.write_text(inspection_page(inspection, QUESTION, *inspection.weights), encoding="utf-8")
    for width in (1000, 375):
        with page_in_chromium(path, width) as (page, requests):
            assert page.title() == QUESTION
            assert page.inner_text("h1") == QUESTION
            assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page does not scroll sideways"
            tokens = page.locator(".text > .token")
            assert tokens.count() == len(inspection.tokens)
            for i in (0, 7):
                panel = tokens.nth(i).locator(".panel")
                assert not panel.is_visible()
                tokens.nth(i).hover()
                assert panel.is_visible()
                for name in inspection.responses:
                    first = inspection.tokens[i].top[name][0]
                    assert f"{100 * first.probability:.1f}" in panel.inner_text()
            page.mouse.move(0, 0)
            tokens.nth(3).focus()
            assert tokens.nth(3).locator(".panel").is_visible(), "a tap or Tab also shows it"
            tokens.nth(5).hover()
            assert page.locator(".panel:visible").count() == 1
            colours = page.evaluate(
                "[...document.querySelectorAll('.legend .token')].map(t => getComputedStyle(t).backgroundColor)"
            )
            assert len(set(colours)) == len(inspection.carriers)
            assert requests == [path.as_uri()]


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("pair")
    tokenizer = quickstart_tokenizer(Arithmetic.alphabet)
    for seed, name in enumerate(("base", "sft")):
        torch.manual_seed(seed)
        tiny_model(len(tokenizer)).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return str(root / "base"), str(root / "sft")


def run(pair, *flags, question="7+8-9+4") -> int:
    return main(["inspect", question, "--model_name_or_path", pair[0], "--anchor", pair[1], *flags])


def test_the_command_prints_a_row_per_token_and_writes_the_page(pair, tmp_path, capsys):
    path = tmp_path / "page.html"
    assert run(pair, "--max_new_tokens", "12", "--output_file", str(path), "--alpha", "0.25") == 0
    printed = capsys.readouterr().out
    assert "alpha 0.25, scheme logit" in printed
    assert sum(int(count) for count in re.findall(r"(?:both|policy|anchor|neither) (\d+)", printed)) == 12
    html = path.read_text(encoding="utf-8")
    assert "7+8-9+4=?" in ParsedPage(html).text, "the prompt is the task's"
    assert_self_contained(html)


def test_three_members_are_inspected(pair, tmp_path, capsys):
    base, sft = pair
    dexperts(base, sft, base, alpha=2.0).save_pretrained(tmp_path / "dexperts")
    page = tmp_path / "page.html"
    argv = ["inspect", "7+8-9+4", "--model_name_or_path", str(tmp_path / "dexperts"), "--max_new_tokens", "9"]
    assert main([*argv, "--output_file", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "weights 1, 2, -2, scheme logit" in printed
    counts = re.search(r"Tokens carried by: all (\d+), policy (\d+), anchor_0 (\d+), .*several (\d+), none", printed)
    assert counts is not None
    assert f"{tmp_path / 'dexperts'} (anchor_1), weight -2." in ParsedPage(page.read_text()).text
    assert main([*argv, "--alpha", "0.5"]) == 2
    assert "alpha is the weight of one anchor; 3 members need weights" in capsys.readouterr().err


def test_a_question_may_begin_with_a_minus(pair, tmp_path):
    path = tmp_path / "page.html"
    assert run(pair, "--max_new_tokens", "2", "--output_file", str(path), question="-3+4") == 0
    assert "-3+4=?" in path.read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--question", " "], "the question is empty"),
        (["--max_new_tokens", "0"], "max_new_tokens is 0"),
        (["--max_new_tokens", "300"], "exceeds the members' context of 256; shorten or drop the prompt, or lower"),
        (["--output_file", "no/such/folder/page.html"], "give a file in a folder that exists"),
        (["--scheme", "prob", "--alpha", "-1"], "scheme 'prob' needs weights >= 0"),
        (["--template", "boxed"], "has no chat template"),
    ],
)
def test_invalid_arguments_are_rejected(pair, tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    assert run(pair, *flags) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_is_not_a_mixture_is_rejected(pair, capsys):
    assert main(["inspect", "1+1", "--model_name_or_path", pair[0]]) == 2
    assert "is not a mixture; give its anchor with --anchor" in capsys.readouterr().err
