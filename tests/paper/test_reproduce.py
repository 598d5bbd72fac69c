"""`logitmix reproduce`: stages run by the other commands, the report, interruptions, wrong input."""

import json
from pathlib import Path

import pytest

from logitmix.cli import distill, train
from logitmix.cli.__main__ import main
from logitmix.cli.options.parser import build
from logitmix.paper.claims import CLAIMS
from logitmix.paper.recipes import ARMS, EXTRA_ARMS, EXTRA_TITLES, PAPER_CELLS
from logitmix.paper.report import write_report
from logitmix.paper.reproduction import format_time_left
from logitmix.paper.scales import SCALES, load_scale
from logitmix.paper.stages import plan_stages
from logitmix.runs.files import append_jsonl
from tests.helpers.browser import ParsedPage, assert_self_contained, page_in_chromium
from tests.helpers.paths import ROOT

KINDS = ["base", "sft", "sweep", *ARMS, *EXTRA_TITLES]
RESULTS = ROOT / "docs" / "results" / "smollm2" / "results.jsonl"
CLAIMED = len(CLAIMS) + len(EXTRA_TITLES)


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Path:
    """The smoke scale, interrupted by Ctrl-C in its second arm and then continued."""
    folder = tmp_path_factory.mktemp("reproduce") / "smoke"
    flags = ["reproduce", "--scale", "smoke", "--seeds", "1", "--output_dir", str(folder)]
    run = train.run

    def stop(options, command):
        run(options, command)
        if options.recipe.recipe == "arithmetic/tiny/base_anchor":
            (folder / "seed-0" / "base_anchor" / "training_args.bin").unlink()  # as if it had not finished
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "run", stop)
        assert main(flags) == 130
    assert [row["kind"] for row in rows_of(folder / "times.jsonl")] == KINDS[:5]
    assert not (folder / "report").exists()
    assert main(flags) == 0
    return folder


@pytest.mark.slow
def test_complete_stages_are_not_made_again(interrupted):
    made = [row["kind"] for row in rows_of(interrupted / "times.jsonl")]
    assert made == [*KINDS[:5], *KINDS[4:]], "base_anchor twice"
    starts = {kind: len(rows_of(interrupted / "seed-0" / kind / "run.jsonl")) for kind in KINDS[1:]}
    assert starts == dict.fromkeys(KINDS[1:], 1) | {"base_anchor": 2}
    evaluations = rows_of(interrupted / "seed-0" / "base_anchor" / "evaluations.jsonl")
    assert [row["step"] for row in evaluations if row["name"] == "mixture"] == [0, 1, 2]


@pytest.mark.slow
def test_a_trainer_writes_its_arguments_last(interrupted):
    """Which is how a stage is known to be complete."""
    for kind in set(KINDS) - {"sweep", "distilled"}:
        folder = interrupted / "seed-0" / kind
        written = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
        model = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
        assert max(written[name] for name in model) <= written["training_args.bin"]


@pytest.mark.slow
def test_the_report_holds_every_claim_table_and_figure(interrupted):
    report = interrupted / "report"
    rows = rows_of(report / "results.jsonl")
    about, *numbers = rows
    assert about["command"] == "logitmix reproduce --scale smoke --seeds 1"
    assert {row["arm"] for row in numbers if row["what"] == "evaluation"} == {*ARMS, *EXTRA_TITLES}
    assert len([row for row in numbers if row["what"] == "sweep"]) == 3 * 11
    assert len([row for row in numbers if row["what"] == "training"]) == 2 * len([*ARMS, *EXTRA_ARMS])
    assert len(json.loads((report / "claims.json").read_text())) == CLAIMED
    pictures = {"figure-2", "figure-3", "figure-6", "figure-8", "figure-9", "table-4", "alpha", "reward"}
    for name in pictures:
        assert (report / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (report / f"{name}.svg").read_text()
    readme = (report / "README.md").read_text()
    for text in (
        "Table 1",
        "Table 2",
        "Table 3",
        "Table 4",
        "one model in the end",
        *(f"({name}.png)" for name in pictures),
    ):
        assert text in readme
    page = (report / "index.html").read_text()
    assert_self_contained(page)
    parsed = ParsedPage(page)
    assert parsed.tags.count("svg") == len(pictures)
    assert parsed.text.count("What decides:") == CLAIMED
    assert "logitmix reproduce --scale math-3b" in parsed.text, "and that it was not run"


@pytest.mark.slow
def test_the_report_can_be_committed(interrupted):
    files = list((interrupted / "report").iterdir())
    assert sum(file.stat().st_size for file in files) < 2e6
    for file in files:
        assert str(interrupted).encode() not in file.read_bytes(), file.name
        assert str(Path.home()).encode() + b"/" not in file.read_bytes(), file.name


@pytest.mark.slow
def test_the_page_uses_no_network_and_fits_a_phone(interrupted):
    with page_in_chromium(interrupted / "report" / "index.html", width=390) as (page, requests):
        assert len(requests) == 1
        assert page.locator(".claims li").count() == CLAIMED
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.slow
def test_seeds_of_an_earlier_report_join_the_report_and_are_not_run(interrupted, tmp_path):
    """As if seed 0 had run on another machine."""
    earlier = interrupted / "report" / "results.jsonl"
    folder = tmp_path / "out"
    flags = ["--scale", "smoke", "--seeds", "2", "--earlier_results", str(earlier), "--output_dir", str(folder)]
    assert main(["reproduce", *flags]) == 0
    assert {row["seed"] for row in rows_of(folder / "times.jsonl")} == {1}
    assert not (folder / "seed-0").exists()
    about, *rows = rows_of(folder / "report" / "results.jsonl")
    theirs, *expected = rows_of(earlier)
    assert [row for row in rows if row["seed"] == 0] == expected
    assert len([row for row in rows if row["seed"] == 1]) == len(expected)
    assert (about["seeds"], about["earlier"]) == (2, theirs | {"seeds_taken": [0]})
    for name in ("README.md", "index.html"):
        page = (folder / "report" / name).read_text()
        assert "logitmix reproduce --scale smoke --seeds 2" in page
        assert "From an earlier report, seed 0:" in page
    assert "fixed mixing, 2 seeds" in (folder / "report" / "figure-2.svg").read_text()


def test_a_report_is_a_function_of_its_results(tmp_path):
    """The committed page of a real model is what today's code makes of the numbers beside it."""
    committed = RESULTS.parent
    write_report(tmp_path, rows_of(RESULTS))
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in committed.iterdir()}
    for name in ("results.jsonl", "claims.json", "README.md"):
        assert (tmp_path / name).read_text() == (committed / name).read_text(), name


@pytest.mark.slow
def test_another_scale_in_its_folder_is_rejected(interrupted, capsys):
    before = (interrupted / "run.jsonl").read_text()
    assert main(["reproduce", "--scale", "tiny", "--output_dir", str(interrupted)]) == 2
    assert "was started with scale 'smoke', now 'tiny'" in capsys.readouterr().err
    assert (interrupted / "run.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "0"], "seeds is 0, but must be at least 1"),
        (["--scale", "math-3"], "there is no scale 'math-3'; did you mean 'math-3b'?"),
        (["--scale", "tinny"], "did you mean 'tiny'? The scales are smoke, tiny, math-1.5b"),
        (["--extra_arms", "distiled"], "there is no extra arm 'distiled'; did you mean 'distilled'?"),
        (["--eval_limit", "5"], "eval_limit is 5, but with so few problems"),
        (["--eval_limit", "0"], "eval_limit is 0, but with so few problems"),
    ],
)
def test_wrong_input(tmp_path, capsys, flags, message):
    assert main(["reproduce", "--output_dir", str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--scale", "tiny"], "is of the scale 'smollm2', not 'tiny'; give --scale smollm2"),
        (["--eval_limit", "50"], "has 100 test problems, not 50; give --eval_limit 100"),
        (["--extra_arms", "anneal"], "differ in anneal; change --extra_arms"),
        (["--seeds", "1"], "has every seed below 1; give more --seeds"),
        (["--earlier_results", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--earlier_results", str(RESULTS.with_name("README.md"))], "README.md is not JSON lines"),
        (["--earlier_results", str(RESULTS.parent)], "is a folder; give the results.jsonl in it"),
    ],
)
def test_results_of_another_reproduction_are_rejected_before_anything_runs(tmp_path, capsys, flags, message):
    first = ["--scale", "smollm2", "--earlier_results", str(RESULTS), "--output_dir", str(tmp_path / "out")]
    assert main(["reproduce", *first, *flags]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_files_is_rejected(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main(["reproduce", "--output_dir", str(tmp_path)]) == 2
    assert "holds something else (thesis.tex); choose another --output_dir" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_dry_run_prints_the_commands_and_writes_nothing(tmp_path, capsys):
    folder = tmp_path / "out"
    assert (
        main(["reproduce", "--scale", "math-3b", "--seeds", "2", "--dry_run", "true", "--output_dir", str(folder)])
        == 0
    )
    printed = capsys.readouterr()
    assert printed.err == "16 of 16 stages to run; nobody has measured yet how long they take.\n"
    lines = printed.out.splitlines()
    assert len(lines) == 2 * (2 + len(ARMS))
    arm = next(line for line in lines if "math/3b/fixed_mixing" in line)
    assert f"--seed 0 --output_dir {folder}/seed-0/fixed_mixing" in arm
    assert f"--anchor {folder}/seed-0/sft" in arm
    assert not folder.exists()


@pytest.mark.parametrize("name", ["tiny", *(cell.replace("/", "-") for cell in PAPER_CELLS)])
def test_every_scale_trains_what_the_paper_compares(name, tmp_path):
    """Policy and anchor of every arm, in the options that its stage is run with."""
    planned = plan_stages(load_scale(name), [0], tmp_path)
    sft = str(tmp_path / "seed-0" / "sft")
    (stage,) = [stage for stage in planned if stage.kind == "sft"]
    base = stage.settings["model_name_or_path"]
    assert base.startswith("Qwen/") == (SCALES[name].base_steps is None)
    expected = dict.fromkeys((*ARMS, *EXTRA_ARMS), (base, sft)) | {"base_anchor": (base, base)}
    expected |= {"grpo": (sft, None), "grpo_kl": (sft, None)}
    for stage in planned:
        if stage.verb == "train":
            options = build(train.TrainOptions, stage.recipe, {**stage.settings, "use_cpu": True, "bf16": False})
            assert (options.model.model_name_or_path, options.training.anchor) == expected[stage.kind]
            assert options.task.eval_limit == 500, "as in the paper"
            assert options.evaluation.eval_every
            assert options.training.output_dir == str(tmp_path / "seed-0" / stage.kind)


def test_any_scale_may_run_the_arms_beyond_the_paper(tmp_path):
    assert [stage.kind for stage in plan_stages(load_scale("tiny"), [0], tmp_path)] == KINDS
    without = [stage.kind for stage in plan_stages(load_scale("math-3b"), [0], tmp_path)]
    assert without == ["sft", "sweep", *ARMS]
    arms = ["distilled", "anneal"]
    *_, student, anneal = plan_stages(load_scale("math-3b"), [0], tmp_path, extra_arms=arms)
    assert [student.kind, anneal.kind] == arms
    options = build(distill.DistillOptions, None, {**student.settings, "use_cpu": True, "bf16": False})
    args = options.training
    assert options.model.model_name_or_path == str(tmp_path / "seed-0" / "fixed_mixing")
    sampled = args.max_steps * args.per_device_train_batch_size * args.gradient_accumulation_steps
    assert sampled == 40 * 2048, "as many completions as the mixture's training"


def test_a_dry_run_says_how_long_it_takes(tmp_path, capsys):
    flags = ["reproduce", "--scale", "smollm2", "--dry_run", "true", "--output_dir", str(tmp_path / "out")]
    assert main(flags) == 0
    minutes = 3 * SCALES["smollm2"].minutes
    assert capsys.readouterr().err == f"24 of 24 stages to run, about {minutes} min on two cores of AMD EPYC.\n"
    for kind in ("sft", "sweep", *ARMS):  # seed 0 has taken 8 minutes
        append_jsonl(tmp_path / "out" / "times.jsonl", [{"seed": 0, "kind": kind, "seconds": 60}])
        last = "sweep.json" if kind == "sweep" else "training_args.bin"
        (tmp_path / "out" / "seed-0" / kind).mkdir(parents=True)
        (tmp_path / "out" / "seed-0" / kind / last).touch()
    assert main(flags) == 0
    assert capsys.readouterr().err == "16 of 24 stages to run, about 16 min left.\n"


def test_the_time_left_is_estimated_from_stages_of_the_same_kind():
    spent = [("sft", 0, 40.0), ("sft", 0, 20.0), ("grpo", 0, 120.0), ("grpo", 1, 240.0)]  # the first was interrupted
    times = [{"kind": kind, "seed": seed, "seconds": seconds} for kind, seed, seconds in spent]
    assert format_time_left([], ["sft"]) == ""
    assert format_time_left(times, ["sft", "grpo"]) == ", about 4 min left"
    assert format_time_left(times, ["prob_mixing"] * 2) == ", about 4 min left", "a kind that has not run: the mean"
    assert format_time_left(times[:1], []) == ", less than a minute left"
