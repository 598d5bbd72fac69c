"""The sweep over alpha: the weight merge, the choice of alpha, the command."""

import json

import pytest
import torch

from logitmix.cli.__main__ import main
from logitmix.evaluation.decode import make_decoder
from logitmix.evaluation.requests import Response, make_batches, make_requests
from logitmix.evaluation.sweep import Round, best_alphas, choose_alpha, dropped_notes, plan_rounds, sweep_rates
from logitmix.mixture.merging import merge_weights, set_merge
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.paper.tiny_model import character_tokenizer, tiny_model
from logitmix.tasks import Arithmetic
from tests.helpers.members import tiny_member
from tests.helpers.responses import make_response


def test_merged_weights_are_the_weighted_mean_and_members_do_not_change():
    policy, anchor = tiny_member(seed=1), tiny_member(seed=2)
    before = {name: weight.clone() for name, weight in policy.named_parameters()}
    merged = merge_weights(policy, anchor, "leave it out")
    anchors = dict(anchor.named_parameters())
    for alpha in (0.3, 0.0, 1.0):  # one copy is reused for every alpha
        set_merge(merged, policy, anchor, alpha)
        for name, weight in merged.named_parameters():
            expected = (1 - alpha) * before[name].double() + alpha * anchors[name].double()
            torch.testing.assert_close(weight.double(), expected, atol=1e-6, rtol=1e-6)
    assert all(torch.equal(weight, before[name]) for name, weight in policy.named_parameters())


def test_a_merge_of_tied_members_stays_tied():
    merged = merge_weights(*(tiny_member(seed=seed, tie_word_embeddings=True) for seed in (1, 2)), "leave it out")
    set_merge(
        merged, tiny_member(seed=1, tie_word_embeddings=True), tiny_member(seed=2, tie_word_embeddings=True), 0.4
    )
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight


def test_merging_in_bfloat16_rounds_once():
    policy, anchor = (tiny_member(seed=seed, dtype=torch.bfloat16) for seed in (1, 2))
    merged = merge_weights(policy, anchor, "leave it out")
    set_merge(merged, policy, anchor, 0.3)
    anchors = dict(anchor.named_parameters())
    for name, weight in merged.named_parameters():
        expected = torch.lerp(policy.get_parameter(name).float(), anchors[name].float(), 0.3).bfloat16()
        assert torch.equal(weight, expected)


def test_merging_models_of_different_shapes_is_rejected():
    with pytest.raises(ValueError, match=r"cannot be merged: .*; leave it out"):
        merge_weights(tiny_member("qwen2"), tiny_member("llama"), "leave it out")


def test_merging_members_that_share_a_model_is_rejected():
    member = tiny_member()
    with pytest.raises(ValueError, match="share one model, whose"):
        merge_weights(member, member, "leave it out")


def responses(name: str, alpha: float, answers: list[bool]) -> list[Response]:
    return [make_response(name=name, alpha=alpha, problem=i, answer_ok=ok, length=3) for i, ok in enumerate(answers)]


def test_alpha_is_chosen_on_even_problems_and_reported_on_odd_ones():
    """At 0.3 only even problems are right, at 0.6 nearly all problems."""
    n = 40
    rows = responses("policy", 0.0, [False] * n) + responses("anchor", 1.0, [i % 4 == 1 for i in range(n)])
    rows += responses("logit", 0.3, [i % 2 == 0 for i in range(n)]) + responses(
        "logit", 0.6, [i > 1 for i in range(n)]
    )
    rows += responses("prob", 0.6, [False] * n)
    logit, prob = choose_alpha(rows)
    assert (logit.mix, logit.alpha, logit.chosen_on.value, logit.reported_on.value) == ("logit", 0.3, 1.0, 0.0)
    assert (logit.policy.value, logit.anchor.value) == (0.0, 0.5)
    assert logit.p_value == pytest.approx(2 / 2**10), "only the anchor has ten of the problems right"
    assert (prob.mix, prob.alpha, prob.p_value) == ("prob", 0.0, prob.p_value), "all rates equal: smallest alpha"
    assert choose_alpha(list(reversed(rows))) == [logit, prob]


def test_every_mix_includes_the_members_at_alpha_0_and_1():
    rows = responses("policy", 0.0, [False] * 10) + responses("anchor", 1.0, [True] * 10)
    rows += responses("logit", 0.5, [True] * 5 + [False] * 5) + responses("merge", 0.5, [True] * 10)
    table = sweep_rates(rows)
    assert [(row["scheme"], row["alpha"], row["answer"]) for row in table] == [
        ("logit", 0.0, 0.0), ("logit", 0.5, 0.5), ("logit", 1.0, 1.0),
        ("merge", 0.0, 0.0), ("merge", 0.5, 1.0), ("merge", 1.0, 1.0),
    ]  # fmt: skip
    assert all(row["answer_low"] <= row["answer"] <= row["answer_high"] for row in table)


def test_halving_doubles_the_problems_of_half_of_the_alphas():
    assert plan_rounds(9, 200, None) == [Round(9, 0, 200)]
    assert plan_rounds(9, 200, 20) == [Round(9, 0, 20), Round(5, 20, 40), Round(3, 40, 80), Round(2, 80, 160),
                                       Round(1, 160, 200)]  # fmt: skip
    assert plan_rounds(4, 1000, 10) == [Round(4, 0, 10), Round(2, 10, 20), Round(1, 20, 1000)]
    assert plan_rounds(9, 20, 20) == [Round(9, 0, 20)]
    for first in (3, 21):
        with pytest.raises(ValueError, match=rf"halve_from is {first}, but the first round needs at least 4"):
            plan_rounds(9, 20, first)


def test_halving_keeps_the_best_alphas_on_even_problems_only():
    n = 8
    rows = responses("logit", 0.2, [i % 2 == 1 for i in range(n)]) + responses("logit", 0.4, [i < 2 for i in range(n)])
    rows += responses("logit", 0.6, [i == 0 for i in range(n)]) + responses("logit", 0.8, [i < 6 for i in range(n)])
    assert best_alphas(rows, "logit", [0.2, 0.4, 0.6, 0.8], 2) == [0.4, 0.8]
    assert best_alphas(rows, "logit", [0.8, 0.4], 1) == [0.8]


def test_dropped_alphas_are_named_and_never_chosen():
    n = 40
    rows = responses("policy", 0.0, [False] * n) + responses("anchor", 1.0, [False] * n)
    rows += responses("logit", 0.3, [True] * 10) + responses("logit", 0.6, [i % 3 == 0 for i in range(n)])
    (choice,) = choose_alpha(rows)
    assert choice.alpha == 0.6
    assert dropped_notes(rows) == ["logit: dropped alpha 0.3 after 10 problems."]
    assert [row["n"] for row in sweep_rates(rows)] == [40, 10, 40, 40]


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("pair")
    tokenizer = character_tokenizer(Arithmetic.alphabet)
    for seed, name in enumerate(("base", "sft")):
        torch.manual_seed(seed)
        tiny_model(len(tokenizer)).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return str(root / "base"), str(root / "sft")


def sweep(pair, *flags) -> int:
    base, sft = pair
    return main([
        "sweep", "--model_name_or_path", base, "--anchor", sft, "--eval_limit", "3", "--max_new_tokens", "6", *flags,
    ])  # fmt: skip


def test_the_command_sweeps_all_mixes_and_continues_after_an_interruption(pair, tmp_path, capsys):
    folder = tmp_path / "sweep"
    flags = ("--alphas", "0.5", "0.25", "--output_dir", str(folder))
    assert sweep(pair, *flags) == 0
    printed = capsys.readouterr().out
    for measure in ("format %", "answer %", "lenient %", "cut %", "tokens"):
        assert f"3 test problems, greedy: {measure}" in " ".join(printed.split())
    assert "merge at 0.25, 0.5: 100 % were cut at 6 tokens: raise --max_new_tokens." in printed
    path = folder / "responses.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    expected = [
        ("policy", 0.0),
        ("anchor", 1.0),
        *((mix, a) for mix in ("logit", "prob", "merge") for a in (0.25, 0.5)),
    ]
    assert [(row["name"], row["alpha"], row["problem"]) for row in rows] == [
        (*who, i) for who in expected for i in range(3)
    ]
    written = json.loads((folder / "sweep.json").read_text())
    assert len(written["rates"]) == 12
    assert [choice["mix"] for choice in written["choices"]] == ["logit", "prob", "merge"]
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (folder / "sweep.svg").read_text()

    whole = path.read_text()
    for kept in (4, 13, 20):
        path.write_text("\n".join(whole.splitlines()[:kept]) + "\n" + whole.splitlines()[kept][:30])
        assert sweep(pair, *flags) == 0
        assert path.read_text() == whole
        assert capsys.readouterr().out == printed


def test_the_command_halves_and_continues_after_an_interruption(pair, tmp_path, capsys):
    folder = tmp_path / "sweep"
    flags = ("--alphas", "0.2", "0.4", "0.6", "--eval_limit", "10", "--halve_from", "4", "--output_dir", str(folder))
    assert sweep(pair, *flags) == 0
    printed = capsys.readouterr().out
    path = folder / "responses.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for mix in ("logit", "prob", "merge"):
        problems = {}
        for row in rows:
            if row["name"] == mix:
                problems.setdefault(row["alpha"], []).append(row["problem"])
        assert sorted(map(len, problems.values())) == [4, 8, 10]
        assert all(found == list(range(len(found))) for found in problems.values())
        assert f"{mix}: dropped alpha " in printed
    whole = path.read_text()
    for kept in (36,):
        path.write_text("\n".join(whole.splitlines()[:kept]) + "\n")
        assert sweep(pair, *flags) == 0
        assert path.read_text() == whole
        assert capsys.readouterr().out == printed
    assert sweep(pair, "--halve_from", "4") == 2
    assert "halve_from is 4, but the first round needs" in capsys.readouterr().err


def test_the_responses_match_those_of_each_mix_alone(pair, tmp_path):
    assert sweep(pair, "--alphas", "0.5", "--output_dir", str(tmp_path / "sweep")) == 0
    lines = (tmp_path / "sweep" / "responses.jsonl").read_text().splitlines()
    rows = {(row["name"], row["problem"]): row["response"] for row in map(json.loads, lines)}
    task, tokenizer = Arithmetic(), character_tokenizer(Arithmetic.alphabet)
    models = {mix: LogitMixForCausalLM.from_members(*pair, alpha=0.5, scheme=mix).eval() for mix in ("logit", "prob")}
    policy, anchor = models["logit"].members
    models["merge"] = merge_weights(policy, anchor, "leave it out")
    set_merge(models["merge"], policy, anchor, 0.5)
    for mix, model in models.items():
        decode = make_decoder(model, tokenizer, task, task.problems("test", 3), 6)
        (batch,) = decode(make_batches(make_requests({mix: None}, 3), 8))
        assert [response.response for response in batch] == [rows[mix, i] for i in range(3)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--alphas", "-0.5"], "scheme 'prob' needs weights >= 0 that sum to 1 (alpha within [0, 1])"),
        (["--alphas", "nan"], "not finite"),
        (
            ["--mixes", "logits"],
            "there is no mix 'logits'; did you mean 'logit'? --mixes takes some of logit, prob, merge",
        ),
        (["--eval_limit", "1"], "raise it above 1"),
        (["--alphas", "0", "1"], "--alphas has only 0 and 1, the members alone, which logitmix eval compares"),
        (["--anchor", "no/such"], "no model at 'no/such'"),
    ],
)
def test_invalid_arguments_are_rejected(pair, tmp_path, capsys, flags, message):
    assert sweep(pair, "--output_dir", str(tmp_path / "out"), *flags) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_a_mixture_is_rejected(pair, capsys):
    assert main(["sweep", "--model_name_or_path", pair[0]]) == 2
    assert "is not a mixture; give its anchor with --anchor" in capsys.readouterr().err


def test_the_logit_scheme_is_swept_outside_zero_to_one(pair):
    assert sweep(pair, "--alphas", "-0.5", "1.5", "--mixes", "logit") == 0
