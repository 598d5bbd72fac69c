"""Inspection of a response: probabilities, the member that carried each token, the table and the page."""

import re

import pytest
import torch

from logitmix.cli.__main__ import main
from logitmix.evaluation.inspect import NAMES, inspect
from logitmix.evaluation.report.pages import inspection_page
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.paper.tiny_model import character_tokenizer as quickstart_tokenizer
from logitmix.paper.tiny_model import tiny_model
from logitmix.tasks import Arithmetic
from tests.helpers.adapters import lora
from tests.helpers.browser import ParsedPage, assert_self_contained, page_in_chromium
from tests.helpers.members import character_tokenizer, tiny_member

QUESTION = '<script>alert(1)</script> & "2<3"?'


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer()


@pytest.fixture(scope="module", params=["logit", "prob", "adapters"])
def inspected(request, tokenizer):
    """A mixture, and the longest of its inspected responses to several prompts (some end early)."""
    qwen = tiny_member("qwen2", seed=1)
    if request.param == "adapters":  # the anchor is the policy's model without its adapter
        model = LogitMixForCausalLM.from_members(qwen, qwen, alpha=0.45, peft_config=lora(init_lora_weights=False))
    else:
        model = LogitMixForCausalLM.from_members(qwen, tiny_member("llama", seed=2), alpha=0.45, scheme=request.param)
    model.eval()
    inspections = [inspect(model, tokenizer, prompt, max_new_tokens=40) for prompt in ("a<b&", "<", "&?", "x+y", "7")]
    return model, max(inspections, key=lambda inspection: len(inspection.tokens))


def softmax64(logits):
    return torch.softmax(logits.double(), dim=-1)


def test_probabilities_match_each_model_run_on_each_prefix(inspected, tokenizer):
    """Each member runs on each prefix without cache; mixing is eq. 1 or its arithmetic form, in float64."""
    model, inspection = inspected
    prompt_ids = tokenizer([inspection.prompt])["input_ids"][0]
    text = {tokenizer.decode([i]): i for i in range(model.config.vocab_size)}
    ids: list[int] = []
    for token in inspection.tokens:
        prefix = torch.tensor([prompt_ids + ids])
        with torch.no_grad():
            policy, anchor = (model(prefix, alpha=alpha).logits[0, -1].double() for alpha in (0.0, 1.0))
        if model.config.scheme == "logit":
            mixture = softmax64(0.55 * policy + 0.45 * anchor)
        else:
            mixture = 0.55 * softmax64(policy) + 0.45 * softmax64(anchor)
        expected = dict(zip(NAMES, (softmax64(policy), softmax64(anchor), mixture), strict=True))
        written = text[token.text]
        assert written == int(mixture.argmax())
        for name, p_V in expected.items():
            assert token.probabilities[name] == pytest.approx(float(p_V[written]), abs=1e-5)
            values, indices = p_V.topk(5)
            assert [text[candidate.text] for candidate in token.top[name]] == indices.tolist()
            assert [candidate.probability for candidate in token.top[name]] == pytest.approx(values.tolist(), abs=1e-5)
        firsts = tuple(int(expected[name].argmax()) == written for name in ("policy", "anchor"))
        by = {(True, True): "both", (True, False): "policy", (False, True): "anchor", (False, False): "neither"}
        assert token.carried_by == by[firsts]
        ids.append(written)
    assert sum(inspection.carried().values()) == len(inspection.tokens) > 15
    assert min(inspection.carried()[name] for name in ("policy", "anchor")) > 0, "the test covers both"


def test_responses_match_those_of_each_model_alone(inspected, tokenizer):
    model, inspection = inspected
    prompt = torch.tensor(tokenizer([inspection.prompt])["input_ids"])
    for name, alpha in (("policy", 0.0), ("anchor", 1.0)):
        ids = model.generate(prompt, alpha=alpha, max_new_tokens=40, do_sample=False, eos_token_id=2)[
            0, prompt.shape[1] :
        ]
        assert inspection.responses[name] == tokenizer.decode(ids, skip_special_tokens=True)
    assert inspection.responses["mixture"] == "".join(
        token.text for token in inspection.tokens if token.text not in ("<pad>", "<bos>", "<eos>")
    )


def test_the_page_escapes_text_and_is_self_contained(inspected):
    _, inspection = inspected
    html = inspection_page(inspection, QUESTION, "<b>policy</b>", "anchor & co")
    assert_self_contained(html)
    parsed = ParsedPage(html)
    for shown in (QUESTION, "<b>policy</b>", "anchor & co", *inspection.responses.values()):
        assert shown in parsed.text
    assert len(re.findall(r'class="panel"', html)) == len(inspection.tokens)


def test_the_page_in_a_browser(inspected, tmp_path):
    _, inspection = inspected
    path = tmp_path / "page.html"
    path.write_text(inspection_page(inspection, QUESTION, "policy", "anchor"), encoding="utf-8")
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
                for name in NAMES:
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
            assert len(set(colours)) == 4
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
