"""Tasks that read data: parsing rows, splitting them, and errors for bad data."""

import json

import pytest

from logitmix.tasks import BOXED, TASKS, Template, load_task
from logitmix.tasks.check import check
from tests.helpers.paths import SHARED

DATA = SHARED / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"the real data is not at {DATA}")
SPLITS = ("train", "validation", "test")

GSM8K = {
    "question": "Weng earns $12 an hour. She did 50 minutes. How much did she earn?",
    "answer": "Weng earns 12/60 = $<<12/60=0.2>>0.2 per minute.\nShe earned $<<0.2*50=10>>10.\n#### 1,010",
}
MMLU = {
    "question": "Find the order of Z_6/<3>.",
    "subject": "abstract_algebra",
    "choices": ["2", "3", "6", "12"],
    "answer": 1,
}
CN_K12 = {"problem": "Find $\\tan α$.", "solution": "It is $\\boxed{-\\frac{1}{3}}$.", "answer": "-\\frac{1}{3}"}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def only_problem(name, row, tmp_path, **columns):
    (problem,) = load_task(name, data=write(tmp_path / "mine.jsonl", [row]), **columns).problems("train")
    return problem


def sums(count, start=0):
    return [{"question": f"What is {n} plus {n + 7}?", "answer": str(2 * n + 7)} for n in range(start, start + count)]


@needs_data
@pytest.mark.parametrize(
    ("name", "folder", "sizes", "total"),
    [
        ("hendrycks_math", "math", [6998, 500, 500], 8000),
        ("cn_k12", "cn_k12", [350, 38, 43], 431),
        ("mmlu", "mmlu", [1468, 163, 181], 1816),
        ("gsm8k", "gsm8k", [6473, 500, 500], 7473),
    ],
)
def test_every_gold_of_the_real_data_matches_itself(name, folder, sizes, total):
    task = load_task(name, data=DATA / folder)
    checked = check(task)
    assert [part.problems for part in checked[:3]] == sizes
    assert sum(part.problems for part in checked) == total
    assert [failure for part in checked for failure in part.failures] == []
    questions = [{problem.question for problem in task.problems(split)} for split in SPLITS]
    assert len(set.union(*questions)) == sum(map(len, questions)), "the splits are disjoint"
    again, other = (load_task(name, data=DATA / folder, seed=seed).problems("validation") for seed in (0, 1))
    assert task.problems("validation") == again != other


@needs_data
@pytest.mark.parametrize(
    ("name", "folder", "total"),
    [("hendrycks_math", "math", 0), ("cn_k12", "cn_k12", 1), ("mmlu", "mmlu", 0), ("gsm8k", "gsm8k", 0)],
)
def test_every_gold_matches_itself_in_a_box(name, folder, total):
    failures = [f for part in check(load_task(name, data=DATA / folder, template="boxed")) for f in part.failures]
    assert len(failures) == total
    # the data truncates this gold, so its braces do not match
    assert all("\\begin{array}{l}{x+y=12}\\\\\\\\{2x+y=20'" in failure for failure in failures)


def test_gsm8k_reads_the_gold_after_the_hashes_and_drops_calculator_calls(tmp_path):
    problem = only_problem("gsm8k", GSM8K, tmp_path)
    assert problem.answer == "1,010"
    assert problem.solution == "Weng earns 12/60 = $0.2 per minute.\nShe earned $10."


def test_mmlu_lists_its_choices_and_demonstrates_the_right_one(tmp_path):
    problem = only_problem("mmlu", MMLU, tmp_path)
    assert problem.question == (
        "Find the order of Z_6/<3>.\nA. 2\nB. 3\nC. 6\nD. 12\nAnswer with the letter of the right choice."
    )
    task = load_task("mmlu", data=tmp_path / "mine.jsonl")
    assert task.demonstration(problem) == " The right choice is B: 3 </think> <answer>B</answer>"
    right, wrong, content = (task.grade(f" so </think> <answer>{a}</answer>", problem) for a in ("B", "C", "3"))
    assert right.answer_ok
    assert not wrong.answer_ok
    assert wrong.format_ok
    assert not content.answer_ok


def test_cn_k12_leaves_out_rows_without_a_single_answer(tmp_path):
    rows = [
        CN_K12,
        CN_K12 | {"problem": "another source", "source": "olympiads"},
        CN_K12 | {"problem": "two questions", "solution": "\\boxed{1} and \\boxed{2}"},
        CN_K12 | {"problem": "a proof", "answer": "proof"},
        CN_K12 | {"problem": "no answer", "answer": None},
        CN_K12 | {"problem": "invalid", "problem_is_valid": "Incomplete"},
        CN_K12 | {"problem": "valid", "problem_is_valid": "Yes", "solution_is_valid": "Yes", "source": "cn_k12"},
    ]
    task = load_task("cn_k12", data=write(tmp_path / "cn_k12.jsonl", rows))
    assert [problem.question for problem in task.problems("train")] == ["Find $\\tan α$.", "valid"]
    assert task.left_out == 5


def test_jsonl_reads_the_named_columns(tmp_path):
    row = {"frage": " What is 2+3? ", "antwort": 5, "weg": "2+3=5"}
    columns = {"question_column": "frage", "answer_column": "antwort", "solution_column": "weg"}
    problem = only_problem("jsonl", row, tmp_path, **columns)
    assert (problem.question, problem.answer, problem.solution) == ("What is 2+3?", "5", "2+3=5")


def test_jsonl_without_solutions_grades_but_cannot_demonstrate(tmp_path):
    task = load_task("jsonl", data=write(tmp_path / "mine.jsonl", sums(3)))
    problem = task.problems("train")[0]
    assert task.grade(" so </think> <answer>7</answer>", problem).answer_ok
    with pytest.raises(ValueError, match="no solution to demonstrate"):
        task.demonstrations()


def test_demonstrations_of_a_chat_template_are_messages(tmp_path):
    row = {"question": "What is 2+3?", "answer": "5", "why": "It is $\\boxed{5}$."}
    task = load_task("jsonl", data=write(tmp_path / "mine.jsonl", [row]), template="boxed", solution_column="why")
    (demonstration,) = task.demonstrations()
    assert demonstration["prompt"] == [
        {"role": "user", "content": BOXED.prompt_format.format(question=row["question"])}
    ]
    assert demonstration["completion"] == [
        {"role": "assistant", "content": "It is $5$.\n\nThe final answer is $\\boxed{5}$."}
    ]


def test_the_seed_selects_the_test_split_of_a_folder_without_test_files(tmp_path):
    write(tmp_path / "train.jsonl", sums(100))
    tasks = [load_task("jsonl", data=tmp_path, seed=seed) for seed in (0, 0, 1)]
    assert [len(tasks[0].problems(split)) for split in SPLITS] == [81, 9, 10]
    first, again, other = (task.problems("test") for task in tasks)
    assert first == again != other


def test_repeats_and_near_duplicates_are_dropped_and_counted(tmp_path):
    near = {"question": "How many integers are there in the solution set of $|x-2| \\leq 5.6$?", "answer": "11"}
    test = {"question": "How many integers are in the solution set of $|x-2|\\leq5.6$ ?", "answer": "11"}
    write(tmp_path / "train.jsonl", [*sums(20), *sums(2), near])
    write(tmp_path / "test.jsonl", [test, *sums(1, start=5), *sums(1, start=5)])
    task = load_task("jsonl", data=tmp_path)
    assert [problem.answer for problem in task.dropped["repeats"]] == ["7", "9", "17", "17"]
    assert [problem.question for problem in task.dropped["near-duplicates of test"]] == [near["question"]]
    assert len(task.problems("train")) + len(task.problems("validation")) == 19
    assert len(task.problems("test")) == 2


@pytest.mark.parametrize(
    ("name", "repository", "config", "train"),
    [
        ("cn_k12", "AI-MO/NuminaMath-1.5", None, "train"),
        ("mmlu", "cais/mmlu", "all", "dev+validation"),
        ("gsm8k", "openai/gsm8k", "main", "train"),
    ],
)
def test_without_data_the_hub_is_read(monkeypatch, name, repository, config, train):
    import datasets

    loaded = []

    def load_dataset(*source, split):
        loaded.append((*source, split))
        return [{"cn_k12": CN_K12 | {"source": "cn_k12"}, "mmlu": MMLU, "gsm8k": GSM8K | {"question": split}}[name]]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = load_task(name)
    if name == "mmlu":  # train and test hold the same question here
        with pytest.raises(ValueError, match="train split of cais/mmlu is empty: all of its problems are also in"):
            task.problems("train")
    else:
        assert len(task.problems("train")) == 1
    assert (repository, config, train) in loaded
    assert len(loaded) == (1 if name == "cn_k12" else 2)


@pytest.mark.parametrize("name", ["cn_k12", "mmlu", "gsm8k"])
def test_a_failed_download_names_both_ways_out(monkeypatch, name):
    import datasets

    def offline(*_args, **_kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        ValueError, match=r"could not be downloaded .*connect to the network .*or give data \(--data\), a folder"
    ):
        load_task(name).problems("train")


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("jsonl", {"question": "a"}, "row 1 of .* has no column 'answer', only 'question'; rename the column"),
        ("jsonl", {"question": "a", "answer": None}, "row 1 of .* has no answer; correct the row"),
        ("jsonl", {"question": " ", "answer": "1"}, "row 1 of .* has no question; correct the row"),
        ("jsonl", ["a", "1"], "row 1 of .* is not a JSON object"),
        ("gsm8k", {"question": "a", "answer": "It is 5."}, "no answer; its column 'answer' must end in '#### '"),
        ("gsm8k", {"question": "a", "answer": "It is 5.\n####"}, "no answer; its column 'answer' must end in"),
        ("mmlu", MMLU | {"answer": 4}, "no answer; its answer must be the index of one of its four choices"),
        ("mmlu", MMLU | {"choices": None}, "no answer; its answer must be the index"),
        ("mmlu", MMLU | {"answer": "B"}, "no answer; its answer must be the index"),
        ("mmlu", MMLU | {"choices": ["1", "2"]}, "no answer; its answer must be the index"),
        ("cn_k12", CN_K12 | {"answer": "proof"}, "holds no problems; give data with at least one row"),
        ("cn_k12", {"problem": "a", "solution": "b"}, "has no column 'answer'"),
    ],
)
def test_bad_rows_are_rejected_by_number(tmp_path, name, row, message):
    with pytest.raises(ValueError, match=message):
        load_task(name, data=write(tmp_path / "mine.jsonl", [row])).problems("train")


def test_a_train_split_contained_in_test_is_rejected(tmp_path):
    write(tmp_path / "train.jsonl", sums(3))
    write(tmp_path / "test.jsonl", sums(5))
    with pytest.raises(ValueError, match=r"the train split of .* is empty: all of its problems are also in test"):
        load_task("jsonl", data=tmp_path).problems("train")


def test_a_gold_that_contains_the_stop_string_is_rejected(tmp_path):
    template = Template("mine", "{question}\n", "{solution} ANSWER {answer};", r".*ANSWER (?P<answer>.*);", (";",))
    write(tmp_path / "mine.jsonl", [{"question": "Which two?", "answer": "1; 2"}])
    task = load_task("jsonl", data=tmp_path / "mine.jsonl", template=template)
    with pytest.raises(ValueError, match=r"template 'mine' stops at ';', which its own response to the answer '1; 2'"):
        task.problems("train")


def test_requesting_more_demonstrations_than_exist_is_rejected(tmp_path):
    task = load_task("gsm8k", data=write(tmp_path / "mine.jsonl", [GSM8K]))
    assert len(task.demonstrations(1)) == 1
    with pytest.raises(ValueError, match="2 demonstrations are requested, but gsm8k has 1 training problems; lower"):
        task.demonstrations(2)


def test_jsonl_requires_data():
    message = r"the task 'jsonl' reads your own data; give data \(--data\), a folder with train"
    with pytest.raises(ValueError, match=message):
        load_task("jsonl")


def test_only_jsonl_accepts_column_names(tmp_path):
    with pytest.raises(ValueError, match="the task 'gsm8k' does not choose its columns, but answer_column is a;"):
        load_task("gsm8k", data=tmp_path, answer_column="a")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module.Mine", "the task 'no_such_module.Mine' cannot be imported: No module named 'no_such_module'"),
        ("json.JSONDecoder", "json has no class 'JSONDecoder' that is a logitmix.tasks.Task"),
        ("json.Nothing", "json has no class 'Nothing'"),
    ],
)
def test_a_custom_task_that_cannot_be_loaded_is_rejected(name, message):
    with pytest.raises(ValueError, match=message):
        load_task(name)


def test_the_docstring_of_every_data_task_shows_a_raw_record():
    import sys

    for name, task in TASKS.items():
        if name not in ("arithmetic", "word_problems", "word_sums"):  # which are generated
            assert "A raw record" in sys.modules[task.__module__].__doc__
