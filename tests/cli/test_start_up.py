"""What needs no model loads none of the libraries for models, and so answers at once."""

import json
import subprocess
import sys

import pytest

from logitmix.cli.__main__ import VERBS

HEAVY = {"torch", "transformers", "datasets", "accelerate", "peft", "matplotlib"}


def run_and_list_imports(code: str, cwd=None) -> tuple[set[str], str]:
    """The heavy libraries that a fresh Python has imported after `code`, and what it printed on standard error."""
    script = f"{code}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return HEAVY & set(done.stdout.splitlines()[-1].split()), done.stderr


def run_command(*argv: str, status: int, cwd=None) -> tuple[set[str], str]:
    return run_and_list_imports(
        f"from logitmix.cli.__main__ import main\nassert main({list(argv)!r}) == {status}", cwd
    )


def processor_seconds(code: str) -> float:
    """The processor time of a fresh Python that runs `code`, which does not grow when other processes run."""
    script = f"{code}\nimport sys, time\nprint(time.process_time(), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stderr.splitlines()[-1])


@pytest.fixture(scope="module")
def torch_seconds() -> float:
    return processor_seconds("import torch")


def packages_after(code: str) -> set[str]:
    """The packages, without private and standard ones, that a fresh Python has imported after `code`."""
    script = f"{code}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}
    return {name for name in names - sys.stdlib_module_names if not name.startswith("_")}


@pytest.mark.parametrize("argv", [["recipes"], ["--help"], ["--version"], ["check-task", "arithmetic"]], ids=" ".join)
def test_what_needs_no_model_imports_no_library_for_models(argv):
    assert run_command(*argv, status=0) == (set(), "")


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["recipe"], "did you mean 'recipes'?"),
        (["recipes", "math"], "takes no arguments"),
        (["report"], "required: --runs"),
        (["report", "nowhere"], "nowhere is not a folder"),
        (["report", "run", "--titel", "x"], "did you mean 'title'?"),
        (["check-task", "gsm"], "did you mean 'gsm8k'?"),
        (["eval"], "required: --model_name_or_path"),
        (["eval", "--model_name_or_path", "x", "--eval_limit", "0"], "must be at least 1"),
        (["sweep", "--model_name_or_path", "x", "--alphas", "half"], "half"),
        (["inspect", "--model_name_or_path", "x"], "required: --question"),
        (["complement"], "required: --sources"),
        (["export"], "required: --model_name_or_path"),
        (["serve"], "needs the folder of a mixture"),
        (["train"], "required: --model_name_or_path"),
        (["train", "--model_name_or_path", "x", "--learning_rat", "3"], "did you mean 'learning_rate'?"),
        (["train", "--model_name_or_path", "x", "--max_steps", "1.5"], "invalid int value: '1.5'"),
        (["train", "--model_name_or_path", "x", "--loss_head", "fast"], "invalid choice: 'fast'"),
        (["train", "--model_name_or_path", "x", "--optim", "adan"], "invalid choice: 'adan'"),
        (["train", "--model_name_or_path", "x", "--alpha", "1.5"], "training needs 0 <= alpha < 1"),
        (["train", "--model_name_or_path", "x", "--eval_strategy", "steps"], "use --eval_every STEPS"),
        (["train", "--model_name_or_path", "x", "--lora_r", "4"], "there is no adapter; add --use_peft"),
        (["train", "--recipe", "math/3b/sft"], "is a recipe for `logitmix sft`"),
        (["train", "--recipe", "math/3b/fixed"], "there is no recipe"),
        (["sft", "--model_name_or_path", "x", "--config", "none.yaml"], "there is no config file 'none.yaml'"),
        (["sft", "--model_name_or_path", "x", "--packing", "perhaps"], "Truthy value expected"),
        (["quickstart", "--arm", "grpo"], "did you mean 'arms'?"),
        (["reproduce", "--scales", "tiny"], "did you mean 'scale'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_refused_command_imports_no_library_for_models(argv, error, tmp_path):
    imported, printed = run_command(*argv, status=2, cwd=tmp_path)
    assert error in printed
    assert imported == set()


@pytest.mark.parametrize("argv", [[verb, "--help"] for verb in VERBS] + [["train", "--help", "all"]], ids=" ".join)
def test_help_takes_less_processor_time_than_importing_torch(argv, torch_seconds):
    """About a third of it, also on a slow or busy machine. torch takes 1.5 s where help is to take less than 1."""
    if argv[0] == "lm-eval":
        pytest.importorskip("lm_eval")
    seconds = processor_seconds(
        f"""
from logitmix.cli.__main__ import main
try:
    main({argv!r})
except SystemExit as stop:
    assert not stop.code
"""
    )
    assert seconds < torch_seconds


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("from logitmix import LogitMixGRPOTrainer", "from trl import GRPOTrainer"),
        ("from logitmix import LogitMixForCausalLM", "from transformers import AutoModelForCausalLM; import peft"),
        ("from logitmix import mix_logits", "import torch"),
    ],
)
def test_a_name_imports_no_library_beside_those_it_extends(ours, theirs):
    added = packages_after(ours) - packages_after(theirs)
    assert added <= {"logitmix"}


def test_a_report_imports_only_what_plots_it(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    rows = [{"step": step, "name": "model", "n": 4, "format": 0.5, "answer": 0.25} for step in (0, 1)]
    files = {"run": [{"arguments": {}}], "evaluations": rows, "metrics": [{"step": 1, "reward": 0.5}]}
    for name, lines in files.items():
        (run / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run_command("report", str(run), status=0, cwd=tmp_path)[0] == {"matplotlib"}
    assert (tmp_path / "report" / "report.html").exists()


def test_the_package_imports_names_on_first_use():
    assert run_and_list_imports("import logitmix, logitmix.tasks, logitmix.paper.recipes")[0] == set()


def test_libraries_show_no_progress_bars_of_their_own():
    """They would interleave with those of the commands."""
    code = """
from logitmix.cli.__main__ import main
assert main(["recipes"]) == 0
from datasets import are_progress_bars_disabled
from transformers.utils import logging
assert are_progress_bars_disabled() and not logging.is_progress_bar_enabled()
"""
    run_and_list_imports(code)
