"""Reports of training runs: grouping runs by arm, curves, and the files written."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from logitmix.cli.__main__ import main
from logitmix.evaluation.report.curves import PANELS, curve, group_by_arm, panel_lines, points, read_runs
from logitmix.evaluation.report.training_report import select_drawn
from tests.helpers.browser import ParsedPage, assert_self_contained, page_in_chromium

UPDATES = 2  # per outer step, in the runs below


def answer(alpha: float, seed: int, step: int) -> float:
    return 0.3 + 0.1 * alpha + 0.01 * seed + 0.005 * step


def write_run(folder: Path, seed: int = 0, alpha: float = 0.5, last: int = 8, mixture: bool = True, **more) -> Path:
    """Write a run of 8 updates up to update `last`."""
    arguments = {
        "seed": seed,
        "alpha": alpha,
        "max_steps": 8,
        "output_dir": str(folder),
        "anchor": "sft" if mixture else None,
    }
    arguments |= {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "num_iterations": 1} | more
    folder.mkdir(parents=True)
    (folder / "run.jsonl").write_text(json.dumps({"arguments": arguments}) + "\n")
    evaluations, metrics = [], []
    for step in range(0, last + 1, 4):
        for name in ("policy", "anchor", "mixture") if mixture else ("model",):
            value = answer(alpha, seed, step) if name in ("mixture", "model") else 0.1
            evaluations.append({"step": step, "name": name, "n": 100, "answer": value, "format": 0.9})
    for step in range(1, last + 1):
        log = {"step": step, "reward": 0.5, "format_rate": 0.8, "entropy": 0.1, "completions/mean_length": 20.0}
        metrics.append(
            log | ({"alpha": alpha, "mixture/kl_policy": 0.02, "mixture/kl_anchor": 0.03} if mixture else {})
        )
    metrics.append({"step": last, "train_runtime": 1.0})
    for name, rows in (("evaluations", evaluations), ("metrics", metrics)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def runs(tmp_path) -> Path:
    """A folder with two seeds of one arm, a run with another alpha, and a run without an anchor."""
    for seed in (0, 1):
        write_run(tmp_path / f"fixed-{seed}", seed)
    write_run(tmp_path / "other", alpha=0.3)
    write_run(tmp_path / "plain", mixture=False)
    return tmp_path


def test_runs_that_differ_only_in_the_seed_form_one_arm(runs):
    arms = group_by_arm(run for folder in sorted(runs.iterdir()) for run in read_runs(str(folder)))
    found = [(arm.label, [run.folder.name for run in arm.runs]) for arm in arms]
    assert found == [("fixed-0", ["fixed-0", "fixed-1"]), ("other", ["other"]), ("plain", ["plain"])]


def test_a_name_defines_an_arm_and_a_folder_of_runs_means_all_of_them(runs):
    arms = group_by_arm([*read_runs(f"mine={runs / 'other'}"), *read_runs(f"mine={runs / 'plain'}")])
    assert [(arm.label, len(arm.runs)) for arm in arms] == [("mine", 2)]
    assert [run.folder.name for run in read_runs(str(runs))] == ["fixed-0", "fixed-1", "other", "plain"]


def test_runs_without_recorded_arguments_form_separate_arms(runs):
    for name in ("fixed-0", "fixed-1"):
        (runs / name / "run.jsonl").unlink()
    arms = group_by_arm([*read_runs(str(runs / "fixed-0")), *read_runs(str(runs / "fixed-1"))])
    assert [arm.label for arm in arms] == ["fixed-0", "fixed-1"]
    assert list(points(arms[0].runs[0], "main", "answer")) == [0, 4, 8], "by default an outer step has one update"


def test_a_curve_has_the_mean_and_range_over_seeds_by_outer_step(runs):
    (arm,) = group_by_arm([*read_runs(str(runs / "fixed-0")), *read_runs(str(runs / "fixed-1"))])
    found = curve(arm, "main", "answer", 100)
    assert found is not None
    assert found.steps == [0, 4 / UPDATES, 8 / UPDATES]
    for values, expected in (
        (found.low, [answer(0.5, 0, step) for step in (0, 4, 8)]),
        (found.high, [answer(0.5, 1, step) for step in (0, 4, 8)]),
        (found.mean, [(answer(0.5, 0, step) + answer(0.5, 1, step)) / 2 for step in (0, 4, 8)]),
    ):
        assert values == pytest.approx([100 * value for value in expected])
    policy = curve(arm, "policy", "answer")
    assert policy is not None
    assert policy.mean == pytest.approx([0.1] * 3)
    assert curve(arm, "metrics", "no such key") is None


def test_panels_show_the_quantities_that_each_run_recorded(runs):
    arms = group_by_arm(read_runs(str(runs)))
    by_file = {panel.file: {line.label: line for line in panel_lines(panel, arms)} for panel in PANELS}
    assert list(by_file["answer"]) == ["fixed-0, 2 seeds", "other", "plain"]
    assert list(by_file["policy"]) == ["fixed-0, 2 seeds", "other"]
    assert list(by_file["kl"])[:2] == ["fixed-0: kl_policy, 2 seeds", "fixed-0: kl_anchor, 2 seeds"]
    assert by_file["cut"] == by_file["validation"] == {}
    assert by_file["alpha"]["other"].curve.mean == [0.3] * 8
    assert {lines["other"].arm for lines in by_file.values() if "other" in lines} == {1}, (
        "an arm has the same style everywhere"
    )


def report(runs: Path, *sources: str, **flags: str) -> tuple[int, Path]:
    out = runs.parent / f"{runs.name}-report"
    return main(["report", *(sources or (str(runs),)), "--output_dir", str(out)]), out


def test_the_command_writes_figures_a_page_and_all_numbers(runs, capsys):
    status, out = report(runs)
    assert status == 0
    printed = capsys.readouterr().out
    assert "fixed-0" in printed
    html = (out / "report.html").read_text(encoding="utf-8")
    assert_self_contained(html)
    with (out / "report.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    main_answers = [row for row in rows if (row["of"], row["quantity"]) == ("mixture", "answer")]
    assert [float(row["value"]) for row in main_answers if row["seed"] == "1"] == [
        answer(0.5, 1, step) for step in (0, 4, 8)
    ]
    assert {row["outer_step"] for row in main_answers} == {"0", "2", "4"}
    drawn = {path.stem for path in out.glob("*.png")}
    assert drawn == {path.stem for path in out.glob("*.svg")}
    assert drawn == {"answer", "format", "policy", "alpha", "reward", "format_rate", "kl", "length", "entropy"}
    assert (out / "answer.png").read_bytes().startswith(b"\x89PNG")
    text = ParsedPage(html).text
    for shown in ("outer step (one sampling of rollouts)", "answer-correct, greedy (%)", "fixed-0, 2 seeds", "at 4"):
        assert shown in text


def test_a_run_in_progress_is_reported_up_to_its_last_evaluation(runs, capsys):
    """Its files end in a truncated line, and another seed is further ahead."""
    shutil.rmtree(runs / "fixed-1")
    folder = write_run(runs / "fixed-1", seed=1, last=4)
    for name in ("evaluations.jsonl", "metrics.jsonl"):
        with (folder / name).open("a") as file:
            file.write('{"step": 5, "rew')
    status, out = report(runs)
    assert status == 0
    assert "4 of 8 so far" in " ".join(ParsedPage((out / "report.html").read_text()).text.split())
    (arm,) = group_by_arm([*read_runs(str(runs / "fixed-0")), *read_runs(str(folder))])
    found = curve(arm, "main", "answer")
    assert found is not None
    assert found.mean[-1] == pytest.approx(answer(0.5, 0, 8)), "the mean over the seeds that reached the step"


def test_labels_are_shown_literally(runs, tmp_path):
    for label in ("$x_1$ & $", "_hidden", "<script>alert(1)</script>"):
        status, out = report(runs, f"{label}={runs / 'other'}")
        assert status == 0
        html = (out / "report.html").read_text(encoding="utf-8")
        assert_self_contained(html)
        assert ParsedPage(html).text.count(label) >= 9, "in the table, and in every figure's legend"


def test_the_page_in_a_browser(runs):
    _, out = report(runs)
    for width in (1100, 375):
        with page_in_chromium(out / "report.html", width) as (page, requests):
            assert page.locator("figure svg").count() == 9
            assert page.locator("figure#answer").inner_text().count("fixed-0, 2 seeds") == 1
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            boxes = page.evaluate(
                "[...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().height)"
            )
            assert min(boxes) > 150
            letters = "[...document.querySelectorAll('figure svg text')].map(t => t.getBoundingClientRect().height)"
            assert min(page.evaluate(letters)) > 8, "readable, in pixels"
            cells = "[...document.querySelectorAll('td')].map(cell => cell.getBoundingClientRect().height)"
            assert max(page.evaluate(cells)) < 40, "cells do not wrap; a wide table scrolls"
            assert len(requests) == 1


def without_evaluations(folder: Path, **more) -> Path:
    (write_run(folder, seed=7, **more) / "evaluations.jsonl").unlink()
    return folder


def test_a_run_without_evaluations_is_drawn_without_the_held_out_curves_and_that_is_said(runs, capsys):
    folder = without_evaluations(runs / "unjudged", alpha=0.9)
    status, out = report(runs, str(folder))
    assert status == 0
    drawn = {path.stem for path in out.glob("*.png")}
    assert drawn == {"alpha", "reward", "format_rate", "kl", "length", "entropy"}
    said = "unjudged has no evaluations, so its held-out curves are missing; --eval_every STEPS of logitmix train"
    assert said in capsys.readouterr().out
    page = " ".join(ParsedPage((out / "report.html").read_text(encoding="utf-8")).text.split())
    assert said in page
    assert "unjudged18––––" in page.replace(" ", "")
    with (out / "report.csv").open(encoding="utf-8") as file:
        assert {row["of"] for row in csv.DictReader(file)} == {"metrics"}


def test_such_a_run_blocks_no_others(runs, capsys):
    """Beside whole runs: one without evaluations in their arm, one that has begun, and an SFT run."""
    without_evaluations(runs / "fixed-7")
    (runs / "begun").mkdir()
    (runs / "begun" / "metrics.jsonl").write_text("")
    (runs / "sft").mkdir()
    (runs / "sft" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    status, out = report(runs)
    assert status == 0
    with (out / "report.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {Path(row["run"]).name for row in rows} == {"fixed-0", "fixed-1", "fixed-7", "other", "plain"}
    page = ParsedPage((out / "report.html").read_text(encoding="utf-8")).text
    assert "fixed-0, 2 seeds" in page, "in the held-out curves"
    assert "fixed-0, 3 seeds" in page, "in the curves of the rollouts"

    assert f"{runs / 'sft'} has neither rewards nor evaluations, and is left out; name it to draw it." in page

    status, _ = report(runs, str(runs / "begun"), str(runs / "sft"), str(runs / "other"))
    assert status == 0
    printed = capsys.readouterr().out
    assert f"{runs / 'begun'} has logged nothing yet, and is left out." in printed
    assert f"{runs / 'sft'} has no evaluations" in printed
    assert (out / "loss.png").exists()


def test_the_kl_to_each_of_several_anchors_is_drawn(tmp_path):
    row = {"step": 1, "mixture/kl_policy": 0.1, "mixture/kl_anchor_0": 0.2, "mixture/kl_anchor_1": 0.3}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    panel = next(panel for panel in PANELS if panel.file == "kl")
    lines = panel_lines(panel, group_by_arm(read_runs(str(tmp_path))))
    assert {line.label.rpartition(": ")[2]: line.curve.mean for line in lines} == {
        "kl_policy": [0.1], "kl_anchor_0": [0.2], "kl_anchor_1": [0.3]
    }  # fmt: skip


def test_updates_of_a_run_without_outer_steps_are_its_steps(tmp_path):
    """As of SFT, whose accumulated batches are no parts of an outer step."""
    arguments = {"command": "sft", "gradient_accumulation_steps": 8}
    (tmp_path / "run.jsonl").write_text(json.dumps({"arguments": arguments}) + "\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    (run,) = read_runs(str(tmp_path))
    assert points(run, "metrics", "loss") == {1: 2.0, 2: 1.0}
    _, (note,) = select_drawn([run])
    assert note.endswith("has no evaluations, so its held-out curves are missing."), "eval_every is of train"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/run", "no/such/run is not a folder; give the --output_dir of a training run"),
        ("empty", "empty holds no run with rewards or evaluations (neither metrics.jsonl nor evaluations.jsonl)"),
        ("begun", "begun: nothing is logged there yet; wait for the first step or evaluation"),
        ("started", "started: nothing is logged there yet"),
    ],
)
def test_a_folder_without_anything_to_draw_is_rejected(runs, capsys, source, message):
    for name, file in (("empty", None), ("begun", "evaluations.jsonl"), ("started", "run.jsonl")):
        (runs / name).mkdir()
        if file is not None:
            (runs / name / file).write_text("")
    status, out = report(runs, source if "/" in source else str(runs / source))
    assert status == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()


def test_the_folder_of_a_run_is_rejected_as_output(runs, capsys):
    folder = next(path for path in sorted(runs.iterdir()) if (path / "run.jsonl").exists())
    before = sorted(folder.iterdir())
    assert main(["report", str(folder), "--output_dir", str(folder)]) == 2
    assert f"holds a run or a model (run.jsonl); give the report its own folder: {folder}/report" in (
        capsys.readouterr().err.replace("\n", " ")
    )
    assert sorted(folder.iterdir()) == before


def test_a_run_given_twice_is_rejected(runs, capsys):
    run = next(path for path in sorted(runs.iterdir()) if (path / "evaluations.jsonl").exists())
    status, out = report(runs, str(run), f"{run}/")
    assert status == 2
    assert "is given twice, and would be compared with itself" in capsys.readouterr().err
    assert not out.exists()
