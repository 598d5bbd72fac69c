"""Decoding responses: batches of several alphas, samples, pass@k, files, and continued evaluations."""

import itertools
import json
from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from logitmix.cli.__main__ import main
from logitmix.evaluation.decode import generation_settings, get_alphas, make_decoder
from logitmix.evaluation.metrics import estimate, pass_rates
from logitmix.evaluation.requests import SMALL_BATCH, Response, make_batches, make_requests
from logitmix.evaluation.responses import Responses, open_responses, read_responses
from logitmix.mixture.generation import generate_completions
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.paper.tiny_model import character_tokenizer, tiny_model
from logitmix.tasks import Arithmetic
from tests.helpers.responses import make_response

TASK = Arithmetic()
ALPHAS = {"policy": 0.0, "anchor": 1.0, "mixture": 0.5, "more anchor": 0.75}


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer(TASK.alphabet)


@pytest.fixture(scope="module")
def members(tokenizer, tmp_path_factory) -> tuple[str, str]:
    folders = []
    for seed, name in enumerate(("base", "sft")):
        folder = tmp_path_factory.mktemp("members") / name
        torch.manual_seed(seed)
        tiny_model(len(tokenizer)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders.append(str(folder))
    return folders[0], folders[1]


@pytest.fixture(scope="module")
def mixtures(members) -> dict[str, LogitMixForCausalLM]:
    return {scheme: LogitMixForCausalLM.from_members(*members, scheme=scheme).eval() for scheme in ("logit", "prob")}


@pytest.mark.parametrize("scheme", ["logit", "prob"])
@pytest.mark.parametrize("batch_size", [64, 6])
def test_a_batch_of_several_alphas_matches_decoding_one_alpha_at_a_time(mixtures, tokenizer, scheme, batch_size):
    problems = TASK.problems("test", 4)
    batches = make_batches(make_requests(ALPHAS, 4), batch_size)
    assert max(len({request.alpha for request in batch}) for batch in batches) > 1, "several alphas in a batch"
    model = mixtures[scheme]
    responses = [
        r for batch in make_decoder(model, tokenizer, TASK, problems, max_new_tokens=12)(batches) for r in batch
    ]
    assert len(responses) == 16
    for response in responses:
        prompt_ids = tokenizer([TASK.prompt(problems[response.problem])])["input_ids"]
        settings = generation_settings(0) | {"max_new_tokens": 12}
        (alone,) = generate_completions(model, tokenizer, prompt_ids, settings, alpha=ALPHAS[response.name])
        assert response.response == tokenizer.decode(alone, skip_special_tokens=True)
        assert response.length == len(alone)


@given(
    st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0]), min_size=1, max_size=4, unique=True),
    st.integers(1, 30),
    st.integers(1, 3),
    st.integers(1, 100),
)
def test_batches_hold_every_request_once_and_large_ones_share_members(alphas, problems, samples, size):
    requests = make_requests({str(alpha): alpha for alpha in alphas}, problems, samples)
    assert len(set(requests)) == len(requests) == len(alphas) * problems * samples
    batches = make_batches(requests, size)
    assert [request for batch in batches for request in batch] == requests, "the batch size does not change the order"
    for batch in batches:
        assert len(batch) <= size
        assert len({request.members for request in batch}) == 1 or len(requests) <= min(size, SMALL_BATCH)


def test_samples_differ_within_a_run_and_repeat_across_runs(mixtures, tokenizer):
    problems = TASK.problems("test", 2)
    batches = make_batches(make_requests({"mixture": 0.5}, 2, num_samples=4), 3)

    def sample(seed, some=batches):
        decoded = make_decoder(mixtures["logit"], tokenizer, TASK, problems, 12, temperature=1.0, seed=seed)(some)
        return [response for batch in decoded for response in batch]

    state = torch.random.get_rng_state()
    first = sample(0)
    assert torch.equal(torch.random.get_rng_state(), state), "torch's generator is restored"
    assert len({r.response for r in first if r.problem == 0}) > 1
    assert sample(0) == first
    assert sample(0, batches[1:]) == first[3:], "a batch's samples do not depend on those before it"
    assert [r.response for r in sample(1)] != [r.response for r in first]


def test_sampling_uses_the_whole_distribution(mixtures, tokenizer):
    """Transformers' default is the 50 most probable tokens; at temperature 1e9 all 1,000 are equally likely."""
    wide = LogitMixForCausalLM.from_members(tiny_model(1000), tiny_model(1000)).eval()
    settings = generation_settings(1e9) | {"max_new_tokens": 2}
    torch.manual_seed(0)
    completions = generate_completions(wide, tokenizer, [[3]] * 200, settings)
    assert len({ids[0] for ids in completions}) > 150


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_interrupted_evaluation_matches_an_uninterrupted_one(mixtures, tokenizer, tmp_path, temperature, capsys):
    problems = TASK.problems("test", 4)
    batches = make_batches(make_requests(get_alphas(mixtures["logit"]), 4, num_samples=2 if temperature else 1), 3)
    decode = make_decoder(mixtures["logit"], tokenizer, TASK, problems, 12, temperature)
    decoded: list[int] = []

    def until(stop_after):
        def decode_some(left):
            for batch in itertools.islice(decode(left), stop_after):
                decoded.append(len(batch))
                yield batch
            if stop_after is not None:
                raise KeyboardInterrupt

        return decode_some

    whole = Responses(tmp_path / "whole.jsonl")
    whole.add("whole", batches, until(None))
    path = tmp_path / "interrupted.jsonl"
    with pytest.raises(KeyboardInterrupt):
        Responses(path).add("first", batches, until(2))
    assert f"{len(path.read_text().splitlines())} responses are in" in " ".join(capsys.readouterr().err.split())
    text = path.read_text()
    path.write_text(text + text.splitlines()[0][:40])  # the process was killed while writing a line
    with pytest.raises(KeyboardInterrupt):
        Responses(path).add("second", batches, until(1))
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]) + "\n")  # or within a batch
    decoded.clear()
    resumed = Responses(path)
    resumed.add("third", batches, until(None))
    assert sum(decoded) == sum(len(batch) for batch in batches[2:]), "only what was missing is decoded"
    assert path.read_text() == (tmp_path / "whole.jsonl").read_text()
    assert resumed.rows == whole.rows
    decoded.clear()
    Responses(path).add("again", batches, until(None))
    assert decoded == []


def test_a_file_of_another_evaluation_is_not_changed(tmp_path):
    path = tmp_path / "responses.jsonl"
    path.write_text(json.dumps(asdict(make_response(problem=7))) + "\n")
    with pytest.raises(
        ValueError, match="holds a response of 'policy' to problem 7 where this evaluation has 'policy'"
    ):
        Responses(path).add("eval", make_batches(make_requests({"policy": 0.0}, 2), 4), lambda left: iter([]))
    assert '"problem": 7' in path.read_text()


def evaluate(members, *flags) -> int:
    base, sft = members
    small = ("--eval_limit", "3", "--max_new_tokens", "8")
    return main(["eval", "--model_name_or_path", base, "--anchor", sft, *small, *flags])


def test_the_command_writes_a_line_per_member_problem_and_sample(members, tmp_path, capsys):
    folder = tmp_path / "eval"
    flags = ["--num_samples", "2", "--temperature", "1", "--output_dir", str(folder)]
    assert evaluate(members, *flags) == 0
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]
    expected = [(n, p, s) for n, p, s in itertools.product(("policy", "anchor", "mixture"), range(3), range(2))]
    assert [(row["name"], row["problem"], row["sample"]) for row in rows] == expected
    fields = ("prompt", "response", "format_ok", "answer_ok", "lenient_ok", "length", "truncated")
    assert all(field in row for row in rows for field in fields)
    assert "pass@2" in printed
    before = (folder / "responses.jsonl").read_bytes()
    assert evaluate(members, *flags, "--batch_size", "2") == 0, "the batch size may change"
    assert capsys.readouterr().out == printed
    assert (folder / "responses.jsonl").read_bytes() == before
    assert len((folder / "run.jsonl").read_text().splitlines()) == 2


def test_continuing_with_other_arguments_is_rejected(members, tmp_path, capsys):
    flags = ["--output_dir", str(tmp_path / "eval")]
    assert evaluate(members, *flags) == 0
    before = (tmp_path / "eval" / "responses.jsonl").read_bytes()
    assert evaluate(members, *flags, "--alpha", "0.3") == 2
    assert "was started with alpha None, now 0.3; continue it with the same" in capsys.readouterr().err
    assert (tmp_path / "eval" / "responses.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_samples", "4"], "at temperature 0 they would all be the same; give --temperature"),
        (["--num_samples", "0"], "num_samples is 0"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--batch_size", "0"], "batch_size is 0"),
        (["--scheme", "prob", "--alpha", "1.5"], "scheme 'prob' needs weights >= 0 that sum to 1"),
        (["--alpha", "nan"], "not finite"),
        (["--max_new_tokens", "1000"], "exceeds the members' context of 256"),
    ],
)
def test_invalid_arguments_are_rejected(members, tmp_path, capsys, flags, message):
    out = tmp_path / "eval"
    assert evaluate(members, *flags, "--output_dir", str(out)) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not out.exists(), "so that the corrected command can use the folder"


@pytest.mark.parametrize("flags", [["--alpha", "0.3"], ["--scheme", "prob"]])
def test_alpha_and_scheme_require_a_mixture(members, capsys, flags):
    assert main(["eval", "--model_name_or_path", members[0], *flags]) == 2
    assert "is not a mixture; add --anchor to mix it with" in capsys.readouterr().err


def test_a_folder_with_other_contents_is_rejected(members, tmp_path):
    with pytest.raises(ValueError, match=r"holds something else \(config.json\)"):
        open_responses(members[0], {})
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; --output_dir must be a folder"):
        open_responses(str(tmp_path / "file"), {})


def make_samples(*answers: list[bool]) -> list[Response]:
    """Responses to problems, each with the given samples."""
    return [make_response(problem=i, answer_ok=ok) for i, samples in enumerate(answers) for ok in samples]


def test_pass_rates_of_a_small_example():
    rows = make_samples([True, False, False], [False, False, False])
    assert pass_rates(rows) == pytest.approx({1: 1 / 6, 2: 2 / 6, 3: 1 / 2})
    with pytest.raises(ValueError, match=r"problems have \[1, 2\] samples"):
        pass_rates(make_samples([True], [True, False]))


def test_the_interval_of_several_samples_is_over_problems():
    """Four equal samples carry no more information than one; differing samples less than as many problems."""
    one = estimate(make_samples(*[[True]] * 30, *[[False]] * 20), "answer_ok")
    four = estimate(make_samples(*[[True] * 4] * 30, *[[False] * 4] * 20), "answer_ok")
    assert asdict(four) == asdict(one)
    assert (one.value, one.low, one.high) == pytest.approx((0.6, 0.462, 0.724), abs=1e-3)
    mixed = estimate(make_samples(*[[True, False]] * 10, *[[True, True]] * 25, *[[False, False]] * 15), "answer_ok")
    assert mixed.value == pytest.approx(0.6)
    assert 0.4 < mixed.low < 0.6 < mixed.high < 0.8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": "3"}, r"line 2 of .*responses\.jsonl is not a response: its 'length' is '3'; give a file"),
        ({"answer_ok": 1}, "its 'answer_ok' is 1"),
        ({"problem": True}, "its 'problem' is True"),
        ({"prompt": None}, "its 'prompt' is None"),
        ({"loss": 1.0}, "it has an unknown field 'loss'"),
        ("gold", "it has no 'gold'"),
    ],
)
def test_a_line_that_is_not_a_response_is_rejected(tmp_path, change, message):
    row = asdict(make_response())
    bad = row | change if isinstance(change, dict) else {key: row[key] for key in row if key != change}
    path = tmp_path / "responses.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (row, bad)))
    with pytest.raises(ValueError, match=message):
        read_responses(path)
    path.write_text("3\n")
    with pytest.raises(ValueError, match=r"line 1 of .* is not a JSON object"):
        read_responses(path)


def test_responses_of_0_1_0_load(tmp_path):
    path = tmp_path / "responses.jsonl"
    path.write_text(
        '{"name": "model", "alpha": null, "problem": 0, "sample": 0, "prompt": "1+1=?\\n", "response": "2", '
        '"gold": "2", "format_ok": true, "answer_ok": true, "lenient_ok": true, "length": 1, "truncated": false}\n'
        '{"name": "policy", "alpha": 0, "problem": 1, "sample": 0, "prompt": "1+2=?\\n", "response": "4", '
        '"gold": "3", "format_ok": true, "answer_ok": false, "lenient_ok": false, "length": 1, "truncated": false}\n'
    )
    model, policy = read_responses(path)
    assert model == make_response(name="model", alpha=None, prompt="1+1=?\n", response="2", gold="2")
    assert (policy.name, policy.alpha, policy.problem, policy.answer_ok) == ("policy", 0.0, 1, False)
