"""The files of a run: how they survive a kill, and what they record of the run's origin."""

import json
import subprocess
import sys
from dataclasses import dataclass

import pytest

from logitmix.runs.files import append_jsonl, drop_lines_after, read_jsonl
from logitmix.runs.folder import find_checkpoint, record_start, rewind, validate_same_arguments
from logitmix.runs.provenance import fingerprint, git_commit

ROWS = [{"step": 1, "x": "a\u2028b\nc"}, {"step": 2}, {"step": 2, "train_runtime": 3.5}, {"name": "no step"}]


@pytest.fixture
def path(tmp_path):
    append_jsonl(tmp_path / "rows.jsonl", ROWS)
    return tmp_path / "rows.jsonl"


def test_a_line_truncated_by_a_kill_is_ignored_and_then_removed(path):
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        count = whole[:end].count(b"\n")
        assert read_jsonl(path) == ROWS[:count]
        drop_lines_after(path, step=None)
        append_jsonl(path, ROWS[count:])
        assert path.read_bytes() == whole


def test_lines_of_later_steps_and_the_summary_of_a_continued_training_are_dropped(path):
    drop_lines_after(path, 2)
    assert read_jsonl(path) == [ROWS[0], ROWS[1], ROWS[3]]
    drop_lines_after(path, 1)
    assert read_jsonl(path) == [ROWS[0], ROWS[3]]
    drop_lines_after(path, -1)
    assert read_jsonl(path) == [ROWS[3]]


def test_a_line_on_a_full_disk(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"metrics.jsonl could not be written to .*: .* are free there"):
        append_jsonl(tmp_path / "metrics.jsonl", [{"step": 1}])


def checkpoint(folder, step):
    (folder / f"checkpoint-{step}").mkdir(parents=True)
    (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return str(folder / f"checkpoint-{step}")


def test_every_argument_that_differs_from_the_resumed_run_is_listed(tmp_path):
    record_start(str(tmp_path), {"alpha": 0.5, "seed": 1, "save_steps": 5, "max_steps": 9})
    found = checkpoint(tmp_path, 4)
    same = {"alpha": 0.5, "seed": 1, "save_steps": 1, "max_steps": 20}
    assert find_checkpoint(str(tmp_path), same, "true") == found
    with pytest.raises(ValueError, match=r"with alpha 0.5, now 0.7, seed 1, now 2; continue it with"):
        find_checkpoint(str(tmp_path), same | {"alpha": 0.7, "seed": 2}, "true")


def test_arguments_that_a_run_did_not_record_differ_unless_a_library_may_have_added_them(tmp_path):
    record_start(str(tmp_path), {"alpha": 0.5})
    now = {"alpha": 0.5, "added": 1}
    validate_same_arguments(tmp_path, now, recorded_only=True)
    validate_same_arguments(tmp_path, now, ignored={"added"})
    with pytest.raises(ValueError, match=r"was started with added None, now 1; continue it with"):
        validate_same_arguments(tmp_path, now)


def test_a_folder_with_only_damaged_checkpoints_is_not_started_again(tmp_path):
    record_start(str(tmp_path), {"max_steps": 9})
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match=r"checkpoint-3 is incomplete: it has no trainer_state"):
        find_checkpoint(str(tmp_path), {"max_steps": 9}, "true")


def test_checkpoints_of_later_steps_are_set_aside_and_kept(tmp_path):
    first, _ = checkpoint(tmp_path, 2), checkpoint(tmp_path, 10)
    (sentence,) = rewind(str(tmp_path), first)
    assert sentence.startswith("checkpoint-10 is of a later step; it is in ")
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert len(list(tmp_path.glob("abandoned-*/checkpoint-10/trainer_state.json"))) == 1


@dataclass
class Row:
    question: str
    answer: str | None


def test_a_fingerprint_depends_only_on_the_rows_and_their_order():
    rows = [Row("one?", "1"), Row("two?", None)]
    expected = fingerprint(rows)
    assert expected["rows"] == 2
    assert fingerprint(iter({"answer": row.answer, "question": row.question} for row in rows)) == expected
    assert fingerprint(rows[::-1]) != expected
    code = "from logitmix.runs.provenance import fingerprint; print(fingerprint([{'question': 'one?', 'answer': '1'}, {'question': 'two?', 'answer': None}])['sha256'])"  # noqa: E501
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == expected["sha256"], "in another process"


def test_the_commit_of_the_project_around_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit() is None
    git = ["git", "-c", "user.name=n", "-c", "user.email=e"]
    (tmp_path / "file").write_text("a")
    for command in (["init"], ["add", "file"], ["commit", "-m", "m"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert git_commit() == {"commit": head, "dirty": False}
    (tmp_path / "file").write_text("b")
    assert git_commit() == {"commit": head, "dirty": True}
