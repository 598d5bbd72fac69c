"""Two policies on the same problems: the paper's tables 1 to 3, and which differences are beyond noise."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from logitmix.cli.__main__ import main
from logitmix.evaluation.complement import complement
from logitmix.evaluation.report.tables import complement_notes
from logitmix.evaluation.requests import Response
from logitmix.paper.tiny_model import character_tokenizer, tiny_model
from logitmix.tasks import Arithmetic
from tests.helpers.responses import make_response

# Table 1 of arXiv 2605.20555: answer rates of SFT and policy; problems that both, one or neither has right
TABLE_1 = {
    "MATH 1.5B": (0.395, 0.530, 56, 50, 23, 71),
    "MATH 3B": (0.590, 0.765, 110, 43, 8, 39),
    "MATH 7B": (0.685, 0.885, 132, 45, 5, 18),
    "MMLU 1.5B": (0.400, 0.440, 46, 42, 34, 78),
    "MMLU 3B": (0.480, 0.575, 83, 32, 13, 72),
    "MMLU 7B": (0.640, 0.710, 113, 29, 15, 43),
    "cn-k12 1.5B": (0.275, 0.210, 19, 23, 36, 122),
    "cn-k12 3B": (0.375, 0.560, 66, 46, 9, 79),
    "cn-k12 7B": (0.585, 0.685, 101, 36, 16, 47),
}


def responses(answers: list[bool], name: str = "policy", **fields) -> list[Response]:
    """A response to each problem; `answers` says which are right and in the format."""
    return [
        make_response(
            **{
                "name": name,
                "problem": i,
                "prompt": f"question {i}",
                "format_ok": ok,
                "answer_ok": ok,
                "lenient_ok": ok,
            }
            | fields
        )
        for i, ok in enumerate(answers)
    ]


def make_pair(both: int, only_b: int, only_a: int, neither: int) -> tuple[list[Response], list[Response]]:
    a = [True] * both + [False] * only_b + [True] * only_a + [False] * neither
    b = [True] * both + [True] * only_b + [False] * only_a + [False] * neither
    return responses(a), responses(b)


@pytest.mark.parametrize("cell", TABLE_1)
def test_the_tables_of_the_paper(cell):
    sft_answer, policy_answer, both, only_policy, only_sft, neither = TABLE_1[cell]
    c = complement(*make_pair(both, only_policy, only_sft, neither))
    assert (c.n, c.both, c.only_b, c.only_a, c.neither) == (200, both, only_policy, only_sft, neither)
    assert (c.answer.a.value, c.answer.b.value) == pytest.approx((sft_answer, policy_answer))
    assert c.answer.b_minus_a.value == pytest.approx(policy_answer - sft_answer)
    assert c.answer.b_minus_a.low < c.answer.b_minus_a.value < c.answer.b_minus_a.high
    assert c.disagreement.value == pytest.approx((only_policy + only_sft) / 200)
    assert c.either.value == pytest.approx(1 - neither / 200)
    beyond = abs(c.answer.b_minus_a.value) >= c.noise - 1e-9
    assert beyond == (c.answer.p_value <= 0.05)
    assert ("beyond noise" if beyond else "within noise:") in complement_notes(c)[1]


def test_two_of_the_papers_nine_answer_gaps_are_within_noise():
    within = [cell for cell, row in TABLE_1.items() if complement(*make_pair(*row[2:])).answer.p_value > 0.05]
    assert within == ["MMLU 1.5B", "cn-k12 1.5B"]


def test_policies_that_never_disagree_differ_by_no_more_than_noise():
    c = complement(*make_pair(50, 0, 0, 50))
    assert c.answer.p_value == 1
    assert "they disagree too rarely for any difference to be beyond noise" in complement_notes(c)[1]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (responses([True] * 9), r"different problem sets: x holds 10 problems \(0 to 9\), y 9 problems \(0 to 8\)"),
        (responses([True] * 10, gold="2"), "the gold of problem 0 is '1' in x and '2' in y"),
        (responses([True] * 10, prompt="?"), "the prompt of problem 0 is 'question 0' in x and '\\?' in y"),
        (responses([True] * 10) * 2, "y holds several samples of one problem"),
    ],
)
def test_different_problem_sets_are_rejected(other, message):
    with pytest.raises(ValueError, match=message):
        complement(responses([True] * 10), other, "x", "y")


def test_too_few_problems_are_rejected():
    with pytest.raises(ValueError, match=r"not even 5 to 0 .*p = 0.062\); raise eval_limit"):
        complement(responses([True] * 5), responses([False] * 5))
    assert complement(responses([True] * 6), responses([False] * 6)).answer.p_value < 0.05


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, str]:
    """Two models, a mixture of them, and one with another tokenizer."""
    from logitmix.mixture.modeling import LogitMixForCausalLM

    root = tmp_path_factory.mktemp("checkpoints")
    for seed, name in enumerate(("base", "sft", "other")):
        alphabet = Arithmetic.alphabet[::-1] if name == "other" else Arithmetic.alphabet
        tokenizer = character_tokenizer(alphabet)
        torch.manual_seed(seed)
        tiny_model(len(tokenizer)).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    LogitMixForCausalLM.from_members(str(root / "base"), str(root / "sft")).save_pretrained(root / "mixture")
    return {folder.name: str(folder) for folder in root.iterdir()}


def write(path, rows) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(row) if isinstance(row, Response) else row) + "\n" for row in rows))
    return str(path)


SMALL = ("--eval_limit", "6", "--max_new_tokens", "4")


def test_comparing_two_checkpoints(checkpoints, tmp_path, capsys):
    folder = tmp_path / "pair"
    argv = ["complement", checkpoints["base"], checkpoints["mixture"], *SMALL, "--output_dir", str(folder)]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert f"A: {checkpoints['base']}" in printed
    assert "Who is right, anywhere in the text" in printed
    assert "B: 100 % were cut at 4 tokens: raise --max_new_tokens." in printed
    rows = [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == [checkpoints["base"]] * 6 + [checkpoints["mixture"]] * 6
    assert json.loads((folder / "complement.json").read_text())["n"] == 6
    assert main(argv) == 0, "the second run decodes nothing"
    assert capsys.readouterr().out == printed


def test_comparing_the_members_of_a_mixture(checkpoints, capsys):
    assert main(["complement", checkpoints["mixture"], *SMALL]) == 0
    assert "A: policy\nB: anchor" in capsys.readouterr().out


def test_comparing_files_of_responses(tmp_path, capsys):
    a, b = make_pair(110, 43, 8, 39)
    two = write(tmp_path / "run" / "responses.jsonl", [replace(response, name="anchor") for response in a] + b)
    other = write(tmp_path / "other.jsonl", b)
    for sources in (
        [str(tmp_path / "run")],
        [f"{two}:policy", f"{two}:anchor"],
        [f"{tmp_path / 'run'}:anchor", other],
    ):
        assert main(["complement", *sources]) == 0
        printed = capsys.readouterr().out
        assert "110" in printed
        assert "17.5 points (B - A), beyond noise" in printed
    assert main(["complement", str(tmp_path / "run"), "--eval_limit", "50"]) == 0
    assert "since the sources are responses, compared as they are: --eval_limit." in capsys.readouterr().err


def test_comparing_a_file_with_a_checkpoint(checkpoints, tmp_path, capsys):
    assert main(["eval", "--model_name_or_path", checkpoints["sft"], *SMALL, "--output_dir", str(tmp_path / "e")]) == 0
    assert main(["complement", str(tmp_path / "e"), checkpoints["base"], *SMALL]) == 0
    assert f"B: {checkpoints['base']}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["base", "other"], "tokenizers differ: token 2"),
        (["base"], "is not a mixture; give a second checkpoint or file of responses"),
        (["base", "sft", "mixture"], "3 sources are given; a comparison takes one or two"),
        (["two.jsonl", "base"], "holds responses of policy, anchor; choose one, as"),
        (["two.jsonl:mixture", "base"], "names 'mixture', but the file holds responses of policy, anchor"),
        (["one.jsonl"], "holds responses of model, not of policy and anchor"),
        (["two.jsonl:policy", "one.jsonl"], "different problem sets: "),
        (["empty.jsonl", "one.jsonl"], "holds no responses; evaluate first"),
        (
            ["metrics.jsonl", "one.jsonl"],
            "metrics.jsonl is not a response: it has no 'name'; give a file that eval wrote",
        ),
        (["no/such", "one.jsonl"], "no model at"),
        (["base", "no/such"], "no model at"),
        (["folder:anchor", "base"], "names 'anchor' of the responses in "),
        (["base", "base"], "is given twice, and would be compared with itself"),
        ([], "required"),
    ],
)
def test_invalid_sources_are_rejected(checkpoints, tmp_path, capsys, sources, message):
    write(tmp_path / "two.jsonl", [*responses([True] * 6), *responses([True] * 6, "anchor")])
    write(tmp_path / "one.jsonl", responses([True] * 7, "model"))
    write(tmp_path / "empty.jsonl", [])
    write(tmp_path / "metrics.jsonl", [{"loss": 1}])
    (tmp_path / "folder").mkdir()
    paths = [checkpoints.get(source, str(tmp_path / source)) for source in sources]
    assert main(["complement", *paths, *SMALL]) == 2
    captured = capsys.readouterr().err
    assert message in captured.splitlines()[-1]
    assert "Traceback" not in captured
