"""What a student keeps of its mixture: the verdict, the comparison of tokens, and the report's files."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from logitmix.evaluation.complement import complement
from logitmix.evaluation.decode import greedy_responses
from logitmix.evaluation.decoding_cost import decoding_costs, weight_bytes
from logitmix.evaluation.distillation import STUDENT, compare_tokens, compare_with_student, decode_student, verdict
from logitmix.evaluation.report.distillation_report import distillation_tables, write_distillation_report
from logitmix.evaluation.requests import Response
from logitmix.loss_head.divergence import token_divergence
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.paper.tiny_model import character_tokenizer
from logitmix.tasks import load_task
from logitmix.training.students import build_student
from tests.helpers.commands import save_member
from tests.helpers.two_processes import mixture as two_adapters


def graded(name: str, right: list[bool]) -> list[Response]:
    return [Response(name, None, i, 0, "p", "r", "g", ok, ok, ok, 5, False) for i, ok in enumerate(right)]


def compared(mixture: list[bool], student: list[bool]):
    return complement(graded("mixture", mixture), graded(STUDENT, student))


def test_the_verdict_follows_mcnemars_test():
    same = verdict(compared([True] * 50 + [False] * 50, [True] * 50 + [False] * 50))
    assert same.startswith("The student keeps the mixture's accuracy within ± ")
    worse = compared([True] * 60 + [False] * 40, [True] * 40 + [False] * 60)
    assert worse.answer.p_value < 0.05
    assert verdict(worse).startswith("The student does not keep the mixture's accuracy at 95 % (-20.0 points")
    few = compared([True] * 10, [True] * 9 + [False])
    assert few.answer.p_value > 0.05
    assert "keeps" in verdict(few)


def test_the_margin_shrinks_with_the_number_of_problems():
    margins = [
        float(verdict(compared([True, False] * n, [True, False] * n)).split("± ")[1].split()[0]) for n in (10, 50, 250)
    ]
    assert margins == sorted(margins, reverse=True)
    assert margins[-1] < 1


def test_the_margin_covers_the_interval():
    c = compared([True] * 55 + [False] * 45, [True] * 50 + [False] * 40 + [True] * 10)
    gap = c.answer.b_minus_a
    margin = float(verdict(c).split("± ")[1].split()[0]) / 100
    assert margin >= max(-gap.low, gap.high) - 1e-3


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    members = [save_member(folder / str(seed), seed) for seed in (0, 1)]
    return LogitMixForCausalLM.from_members(*members, alpha=0.4).eval()


@pytest.fixture(scope="module")
def task():
    return load_task("arithmetic")


@pytest.fixture(scope="module")
def tokenizer(task):
    return character_tokenizer(task.alphabet)


def test_tokens_are_compared_over_the_whole_vocabulary(pair, tokenizer):
    student = build_student(pair, "policy").eval()
    prompts, answers = ["1+2=", "9*8="], ["3+4=7", "72"]
    responses = [replace(r, response=text) for r, text in zip(graded("mixture", [True, True]), answers, strict=True)]
    prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    found = compare_tokens(student, pair, tokenizer, responses, prompt_ids)
    kls, same = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([tokenizer(prompt + answer)["input_ids"]])
        n = len(answer)
        with torch.no_grad():
            z = [m(input_ids=ids).logits[0, -n - 1 : -1] for m in (student, pair)]
        kls.append(token_divergence(*z, beta=0.0)[0])
        same.append(z[0].argmax(-1) == z[1].argmax(-1))
    assert found.tokens == sum(map(len, answers))
    assert found.kl == pytest.approx(torch.cat(kls).mean().item(), rel=1e-4)
    assert found.agreement == pytest.approx(torch.cat(same).float().mean().item())
    assert [t.kl for t in found.worst] == pytest.approx(sorted(torch.cat(kls).tolist(), reverse=True), rel=1e-4)
    worst = found.worst[0]
    answer = answers[worst.problem]
    assert answer.startswith(worst.before + worst.token)


def test_a_student_that_is_the_mixture_differs_nowhere(pair, tokenizer):
    alone = LogitMixForCausalLM.from_members(pair.policy, pair.anchors[0], alpha=0.0).eval()
    response = replace(graded("mixture", [True])[0], response="12")
    found = compare_tokens(
        build_student(alone, "policy"), alone, tokenizer, [response], [tokenizer("1=")["input_ids"]]
    )
    assert found.agreement == 1
    assert abs(found.kl) < 1e-6


def test_a_response_without_tokens_is_left_out(pair, tokenizer):
    empty = replace(graded("mixture", [True])[0], response="")
    with pytest.raises(ValueError, match="no response has a token"):
        compare_tokens(pair.policy, pair, tokenizer, [empty], [[1]])


def test_a_token_that_both_responses_share_is_one_row_of_the_worst(pair, tokenizer):
    student = build_student(pair, "policy").eval()
    prompt_ids = [tokenizer("1+2=")["input_ids"]]
    comparisons = [
        compare_tokens(student, pair, tokenizer, [replace(graded(name, [True])[0], response=text)], prompt_ids)
        for name, text in (("mixture", "3+4=7"), (STUDENT, "3+48"))
    ]
    *_, worst = distillation_tables([*graded("mixture", [True]), *graded(STUDENT, [True])], {}, comparisons)
    names = {row[3] + row[4]: row[0] for row in worst.rows}
    assert len(worst.rows) == len(names) == 6, "three tokens that both share, and the rest of each"
    assert [names[text] for text in ("3", "3+", "3+4")] == ["mixture, student"] * 3
    assert [names[text] for text in ("3+4=", "3+48")] == ["mixture", STUDENT]


def test_a_mixture_holds_the_weights_of_both_and_decodes_the_same_responses(pair, tokenizer, task):
    student = build_student(pair, "policy").eval()
    models = {STUDENT: (student, None), "mixture": (pair, None), "anchor": (pair, 1.0)}
    costs = {c.name: c for c in decoding_costs(models, tokenizer, task, task.problems("test", 40), 5)}
    one = sum(p.numel() for p in student.parameters()) * 4
    assert [costs[name].weight_bytes for name in models] == [one, 2 * one, one]
    config = student.config
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size * 4
    assert [costs[name].cache_bytes for name in models] == [token, 2 * token, token]
    assert all(c.responses == 32 and 32 <= c.tokens <= 160 for c in costs.values())
    assert all(c.tokens_per_second == c.tokens / c.seconds > 0 for c in costs.values())


def test_members_on_one_base_hold_its_weights_once():
    pair = two_adapters(adapters=True)
    adapter = sum(p.numel() for name, p in pair.named_parameters() if "lora" in name) * 4
    assert adapter > 0
    assert weight_bytes(pair) == weight_bytes(pair, "policy") == weight_bytes(pair, "anchor_0") + adapter


def test_the_report_compares_the_same_problems(pair, tokenizer, task, tmp_path, capsys):
    problems = task.problems("test", 8)
    student, folder = build_student(pair, "policy").eval(), tmp_path / "report"
    responses = decode_student(student, pair, tokenizer, task, problems, str(folder), {"a": 1}, 6)
    assert {r.name for r in responses} == {"student", "mixture", "policy", "anchor", "merged"}
    assert len(responses) == 5 * 8
    assert [r.response for r in responses if r.name == "student"] == [
        r.response for r in responses if r.name == "policy"
    ]
    comparisons = compare_with_student(responses)
    assert next(iter(comparisons)) == "mixture"
    prompt_ids = [tokenizer(task.prompt(problem))["input_ids"] for problem in problems]
    tokens = [
        compare_tokens(student, pair, tokenizer, [r for r in responses if r.name == name], prompt_ids)
        for name in ("mixture", "student")
    ]
    costs = decoding_costs({STUDENT: (student, None)}, tokenizer, task, problems, 6)
    sentence = write_distillation_report(folder, "A <title>", responses, comparisons, tokens, costs)
    assert sentence == verdict(comparisons["mixture"])
    readme, page = (folder / "README.md").read_text(), (folder / "report.html").read_text()
    assert sentence in readme
    assert "A &lt;title&gt;" in page
    assert "KL(mixture ‖ student)" in page
    lines = [json.loads(line) for line in (folder / "distillation.jsonl").read_text().splitlines()]
    assert lines[0] == {"verdict": sentence}
    assert [line["decoding_of"] for line in lines if "decoding_of" in line] == [STUDENT]
    assert "| weights, MiB | KV cache a token, KiB |" in readme
    assert {line["minus"] for line in lines if "minus" in line} == {"mixture", "policy", "anchor", "merged"}
    assert [line["responses_of"] for line in lines if "responses_of" in line] == ["mixture", "student"]
    assert decode_student(student, pair, tokenizer, task, problems, str(folder), {"a": 1}, 6) == responses, (
        "no new ones"
    )


def test_members_of_different_shapes_are_compared_without_merged_weights(tokenizer, task, tmp_path):
    from tests.helpers.members import tiny_member

    size = len(tokenizer)
    pair = LogitMixForCausalLM.from_members(
        tiny_member("qwen2", vocab_size=size), tiny_member("llama", vocab_size=size), alpha=0.4
    ).eval()
    responses = decode_student(
        build_student(pair, "policy"), pair, tokenizer, task, task.problems("test", 6), str(tmp_path / "r"), {}, 4
    )
    assert {r.name for r in responses} == {"student", "mixture", "policy", "anchor"}


@pytest.mark.parametrize("names", [["policy", "anchor"], ["policy", "anchor_0", "anchor_1"]])
def test_members_are_compared_where_no_alpha_gives_the_weights(pair, tokenizer, task, tmp_path, names):
    """Each is its own model, which greedy responses and costs show."""
    members = [pair.policy, pair.anchors[0], pair.policy][: len(names)]
    mixture = LogitMixForCausalLM.from_members(
        members[0], [copy.deepcopy(m) for m in members[1:]], weights=[0.7, 0.9, -0.2][: len(names)]
    ).eval()
    student, problems = build_student(mixture, "policy"), task.problems("test", 6)
    responses = decode_student(student, mixture, tokenizer, task, problems, str(tmp_path / "r"), {}, 4)
    texts = {name: [r.response for r in responses if r.name == name] for name in (STUDENT, "mixture", *names)}
    assert len(responses) == 6 * len(texts)
    assert texts[STUDENT] == texts[names[0]]
    assert texts[names[1]] == [
        r.response for r in greedy_responses(pair.anchors[0], tokenizer, task, problems, {"a": None}, 4)
    ]
    costs = decoding_costs(dict.fromkeys(["mixture", *names], (mixture, None)), tokenizer, task, problems, 4)
    sizes = [(c.weight_bytes, c.cache_bytes) for c in costs]
    assert sizes[0] == tuple(len(names) * size for size in sizes[1])
    assert set(sizes[1:]) == {sizes[1]}
