"""The sweep over the weights of several members: points, the choice, the command, and `logitmix eval` beside it."""

import json
import math

import pytest
import torch

from logitmix.cli.__main__ import main
from logitmix.evaluation.weights_sweep import choose_weights, preset_points, simplex_points
from logitmix.mixture.presets import PRESETS, contrastive_decoding, dexperts
from logitmix.paper.tiny_model import character_tokenizer, tiny_model
from logitmix.tasks import Arithmetic
from tests.helpers.responses import make_response


def test_the_simplex_is_a_grid_of_distributions_without_its_corners():
    points = simplex_points(3, 4, "logit")
    assert len(points) == math.comb(4 + 2, 2) - 3
    assert points["logit 0.25/0.25/0.5"] == [0.25, 0.25, 0.5]
    assert all(sum(weights) == 1 and min(weights) >= 0 and max(weights) < 1 for weights in points.values())
    for parts, message in ((1, "simplex_parts is 1, but must be at least 2"), (40, "takes at most 200; lower it")):
        with pytest.raises(ValueError, match=message):
            simplex_points(3, parts, "logit")


def test_a_preset_has_its_weights_at_each_alpha():
    assert preset_points(PRESETS["dexperts"], [2, 0.5, 0.5]) == {
        "dexperts 0.5": [1, 0.5, -0.5],
        "dexperts 2": [1, 2, -2],
    }


def responses(name, answers):
    return [make_response(name=name, alpha=None, problem=i, answer_ok=ok, length=3) for i, ok in enumerate(answers)]


def test_weights_are_chosen_on_even_problems_and_reported_on_odd_ones():
    n = 40
    rows = responses("a", [False] * n) + responses("b", [i % 4 == 1 for i in range(n)])
    rows += responses("half", [i % 2 == 0 for i in range(n)]) + responses("other", [i > 1 for i in range(n)])
    choice = choose_weights(rows, {"half": [0.5, 0.5], "other": [0.25, 0.75]}, ["a", "b"])
    assert (choice.name, choice.weights, choice.chosen_on.value) == ("half", [0.5, 0.5], 1)
    assert (choice.reported_on.value, choice.best_member, choice.member.value) == (0, "b", 0.5)
    assert choice.p_value == pytest.approx(2 / 2**10)


@pytest.fixture(scope="module")
def members(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("members")
    tokenizer = character_tokenizer(Arithmetic.alphabet)
    folders = [str(root / str(seed)) for seed in range(3)]
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        tiny_model(len(tokenizer)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folders


def run(verb, source, *flags) -> int:
    return main([verb, "--model_name_or_path", source, "--eval_limit", "3", "--max_new_tokens", "6", *flags])


def lines(folder):
    return [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]


def test_a_preset_is_swept_and_continues_after_an_interruption(members, tmp_path, capsys):
    base, *others = members
    flags = ("--preset", "dexperts", "--members", *others, "--alphas", "0.5", "2", "--output_dir", str(tmp_path / "s"))
    assert run("sweep", base, *flags) == 0
    printed = capsys.readouterr().out
    assert "Best by answer %, chosen on every second problem: base, with weights 1, 0, 0" in " ".join(printed.split())
    names = ["base", "expert", "antiexpert", "dexperts 0.5", "dexperts 2"]
    found = [(row["name"], row["problem"]) for row in lines(tmp_path / "s")]
    assert found == [(name, i) for name in names for i in range(3)]
    written = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert written["weights"]["dexperts 2"] == [1, 2, -2]

    path = tmp_path / "s" / "responses.jsonl"
    whole = path.read_text()
    path.write_text("".join(whole.splitlines(keepends=True)[:5]))
    assert run("sweep", base, *flags) == 0
    assert path.read_text() == whole

    # a point of the sweep is what the saved preset writes
    dexperts(*members, alpha=2.0).save_pretrained(tmp_path / "saved")
    assert run("eval", str(tmp_path / "saved"), "--output_dir", str(tmp_path / "e")) == 0
    evaluated = {(row["name"], row["problem"]): row["response"] for row in lines(tmp_path / "e")}
    swept = {(row["name"], row["problem"]): row["response"] for row in lines(tmp_path / "s")}
    for i in range(3):
        assert evaluated["mixture", i] == swept["dexperts 2", i]
        assert evaluated["anchor_1", i] == swept["antiexpert", i]


def test_the_simplex_of_a_saved_mixture_is_swept(members, tmp_path):
    dexperts(*members, alpha=2.0).save_pretrained(tmp_path / "saved")
    flags = ("--weights", "simplex", "--simplex_parts", "2", "--simplex_scheme", "prob")
    assert run("sweep", str(tmp_path / "saved"), *flags, "--output_dir", str(tmp_path / "s")) == 0
    names = list(dict.fromkeys(row["name"] for row in lines(tmp_path / "s")))
    assert names == ["policy", "anchor_0", "anchor_1", "prob 0/0.5/0.5", "prob 0.5/0/0.5", "prob 0.5/0.5/0"]


def test_contrastive_decoding_is_swept_with_its_cut(members, tmp_path):
    flags = ("--preset", "contrastive_decoding", "--alphas", "3", "--output_dir", str(tmp_path / "s"))
    assert run("sweep", members[0], "--members", members[1], *flags) == 0
    contrastive_decoding(*members[:2], alpha=3).save_pretrained(tmp_path / "saved")
    assert run("eval", str(tmp_path / "saved"), "--output_dir", str(tmp_path / "e")) == 0
    responses = {(row["name"], row["problem"]): row["response"] for folder in "se" for row in lines(tmp_path / folder)}
    assert [responses["contrastive_decoding 3", i] for i in range(3)] == [responses["mixture", i] for i in range(3)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "dexpert"], "there is no preset 'dexpert'; did you mean 'dexperts'?"),
        (["--preset", "dexperts", "--alphas", "-1"], "alpha is -1.0, but dexperts takes a number of at least 0"),
        (["--preset", "contrastive_decoding"], "--members names 2 members; contrastive_decoding takes the expert as"),
        (["--preset", "dexperts", "--anchor", "x"], "does not read --anchor; give the members after the first as"),
        (["--preset", "dexperts", "--halve_from", "4"], "--preset dexperts does not read --halve_from; leave it out"),
        (["--weights", "simplex", "--alphas", "0.5"], "--weights simplex does not read --alphas; leave it out"),
        (["--preset", "dexperts", "--weights", "simplex"], "give either --preset"),
        ([], "give either --preset"),
        (["--weights", "simplex", "--plausibility", "2"], "plausibility is 2.0, but must be above 0 and at most 1"),
        (["--weights", "simplex", "--simplex_parts", "1"], "simplex_parts is 1"),
        (["--weights", "simplex", "--eval_limit", "1"], "raise it above 1"),
    ],
)
def test_invalid_arguments_are_refused(members, tmp_path, capsys, flags, message):
    assert run("sweep", members[0], "--members", *members[1:], *flags, "--output_dir", str(tmp_path / "out")) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_a_mixture_needs_members(members, capsys):
    assert run("sweep", members[0], "--weights", "simplex") == 2
    assert "is not a mixture; give the members after it with --members" in capsys.readouterr().err
