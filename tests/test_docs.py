"""The code in README and docs runs as written, on tiny members in place of the paths it names."""

import importlib
import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from logitmix.cli.__main__ import VERBS, main
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.paper.quickstart_config import QuickstartConfig
from logitmix.paper.recipes import TITLES
from logitmix.paper.tiny_model import character_tokenizer, tiny_model
from logitmix.tasks import TASKS, Arithmetic
from logitmix.tasks.templates import TEMPLATES
from tests.helpers.paths import ROOT, SHARED
from tests.helpers.tools import tool_mixture, tool_tokenizer, tool_user

MATH = SHARED / "data" / "math"


def python_blocks(name: str) -> list[str]:
    return blocks(name, "python")


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a base and an SFT model at the paths of the documents."""
    monkeypatch.chdir(tmp_path)
    tokenizer = character_tokenizer(Arithmetic.alphabet)
    for seed, path in enumerate(("path/to/base", "path/to/sft")):
        torch.manual_seed(seed)
        tiny_model(len(tokenizer)).save_pretrained(path)
        tokenizer.save_pretrained(path)
    return tmp_path


def test_the_mixture_page(folder, capsys):
    namespace: dict = {}
    for block in python_blocks("docs/mixture.md"):
        exec(compile(block, "docs/mixture.md", "exec"), namespace)
    assert capsys.readouterr().out.startswith("7+8-9+4=?")
    assert (folder / "path/to/policy/config.json").exists()


def test_the_page_on_members_that_read_different_prompts(folder):
    namespace: dict = {}
    for block in python_blocks("docs/contexts.md"):
        exec(compile(block, "docs/contexts.md", "exec"), namespace)
    assert namespace["log_probs"].shape == (2, namespace["rows"]["input_ids"].shape[1] - 1)
    assert namespace["logits"].shape[:2] == (2, 7)


def test_the_training_pages_script(folder):
    (block,) = python_blocks("docs/training.md")
    smaller = "use_cpu=True, bf16=False, report_to=[], max_steps=1, max_completion_length=24, save_strategy='no'"
    exec(compile(block.replace('output_dir="run"', f'output_dir="run", {smaller}'), "docs/training.md", "exec"), {})
    assert (folder / "run/config.json").exists()


def test_the_tools_page(tmp_path, monkeypatch):
    """With a policy that knows the call for one of the page's questions by heart."""
    monkeypatch.chdir(tmp_path)
    tokenizer = tool_tokenizer()
    mixture = tool_mixture(tool_user(tokenizer))
    for member, path in ((mixture.policy, "path/to/base"), (mixture.anchors[0], "path/to/sft")):
        member.save_pretrained(path)
        tokenizer.save_pretrained(path)
    (block,) = python_blocks("docs/tools.md")
    smaller = "use_cpu=True, bf16=False, report_to=[], max_steps=1, save_strategy='no', per_device_train_batch_size=8"
    block = block.replace('output_dir="run"', f'output_dir="run", {smaller}, temperature=0.2, logging_steps=1')
    block = block.replace("for a in range(8) for b in range(8)", "for a in [3] for b in [4]")
    namespace: dict = {}
    exec(compile(block, "docs/tools.md", "exec"), namespace)
    log = namespace["trainer"].state.log_history[0]
    assert log["tools/call_frequency"] > 0.5
    assert log["reward"] > 0.5


def test_the_adapters_page(folder):
    training, use = python_blocks("docs/adapters.md")
    smaller = "use_cpu=True, bf16=False, report_to=[], max_steps=1, max_completion_length=24, save_strategy='no'"
    exec(compile(training.replace('output_dir="run"', f'output_dir="run", {smaller}'), "docs/adapters.md", "exec"), {})
    assert "anchor_0" in json.loads((folder / "run/config.json").read_text())["adapters"]
    exec(compile(use, "docs/adapters.md", "exec"), {})
    assert (folder / "path/to/adapter/adapter_config.json").exists()
    assert (folder / "path/to/merged/config.json").exists()


def test_the_readmes_script_before_and_after(folder):
    """The two scripts of README differ in two lines, and both train."""
    task = Arithmetic()
    rows = [{"prompt": task.prompt(problem), "answer": problem.answer} for problem in task.problems("train", 64)]
    smaller = "use_cpu=True, bf16=False, report_to=[], max_steps=1, max_completion_length=24, save_strategy='no'"
    before, after = python_blocks("README.md")[:2]
    changed = [pair for pair in zip(before.splitlines(), after.splitlines(), strict=True) if pair[0] != pair[1]]
    assert len(changed) == 2
    for block in (before, after):
        namespace = {"dataset": Dataset.from_list(rows), "reward": lambda completions, **_: [0.0] * len(completions)}
        exec(
            compile(block.replace('output_dir="run"', f'output_dir="run", {smaller}'), "README.md", "exec"), namespace
        )
        assert namespace["trainer"].state.global_step == 1


def test_the_commands_of_the_analysis_page(tmp_path, monkeypatch, capsys):
    """As written, with random models at the paths of the quickstart's, and few problems each."""
    monkeypatch.chdir(tmp_path)
    tokenizer = character_tokenizer(Arithmetic.alphabet)
    for seed, name in enumerate(("base", "sft")):
        torch.manual_seed(seed)
        tiny_model(len(tokenizer)).save_pretrained(f"runs/quickstart/{name}")
        tokenizer.save_pretrained(f"runs/quickstart/{name}")
    mixture = LogitMixForCausalLM.from_members("runs/quickstart/base", "runs/quickstart/sft")
    mixture.save_pretrained("runs/quickstart/fixed_mixing")
    run = {"step": 0, "name": "mixture", "n": 6, "answer": 0.5, "format": 0.5}
    for folder in ("runs/quickstart/fixed_mixing", "runs/fixed-0", "runs/fixed-1", "runs/a-7"):
        Path(folder).mkdir(exist_ok=True)
        Path(folder, "evaluations.jsonl").write_text(json.dumps(run) + "\n")
    small = ["--eval_limit", "6", "--max_new_tokens", "4"]
    other = ["eval", "--model_name_or_path", "runs/quickstart/base", "--output_dir", "runs/other-eval", *small]
    assert main(other) == 0
    commands = [
        shlex.split(line, comments=True) for block in blocks("docs/analysis.md", "bash") for line in block.splitlines()
    ]
    seen = set()
    for program, verb, *flags in commands:
        assert program == "logitmix"
        if verb == "lm-eval":  # tests/test_harness.py
            continue
        limits = {"inspect": small[2:], "report": []}.get(verb, small)
        assert main([verb, *flags, *limits]) == 0, (verb, flags, capsys.readouterr().err)
        seen.add(verb)
    assert seen == {"eval", "complement", "sweep", "inspect", "report"}
    assert Path("inspect.html").exists()
    assert Path("report/report.html").exists()


def commands_of_the_pages() -> list[list[str]]:
    """Verb and flags of each command in a block of README and docs; "…" stands for flags that a page leaves out."""
    found = []
    for page in ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]:
        for block in (*blocks(page, "bash"), *blocks(page, "text")):
            lines = [line.removeprefix("$ ") for line in block.replace("\\\n", " ").splitlines()]
            found += [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("logitmix ")]
    return found


def test_every_command_of_the_pages_takes_its_flags(tmp_path, monkeypatch):
    """Without running it; verbs that leave their flags to another program, or have none, are left out."""
    monkeypatch.chdir(tmp_path)
    seen, wrong = set(), []
    for verb, *flags in commands_of_the_pages():
        module = importlib.import_module(VERBS[verb][0])
        if hasattr(module, "run"):
            for name in [name for name in vars(module) if name in ("run", "run_family")]:
                monkeypatch.setattr(module, name, lambda *_: None)
            try:
                module.main([flag for flag in flags if flag != "…"])
            except ValueError as error:  # others are of this machine, such as bf16 without a GPU
                problems = ["does not belong", "unknown key", "invalid", "did you mean"]
                if re.search("|".join(problems if "…" in flags else [*problems, "required"]), str(error)):
                    wrong.append(f"{verb}: {error}")
            seen.add(verb)
    assert wrong == []
    assert {"train", "sft", "distill", "eval", "sweep", "complement", "inspect", "realign", "export"} <= seen


def test_the_tasks_pages_task_and_template(tmp_path, monkeypatch, capsys):
    """The task of the page, saved as described, with rows like the hub's and the template of the page."""
    (code,), (template,) = python_blocks("docs/tasks.md"), blocks("docs/tasks.md", "yaml")
    assert len(code.splitlines()) < 30
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("my_tasks.py").write_text(code)
    Path("mine.yaml").write_text(template)
    rows = [{"ID": n, "Problem": f"What is {n}+{n}?", "Solution": f"{n}+{n}", "Answer": 2 * n} for n in range(30)]
    Path("aime.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for flags in ([], ["--template", "mine.yaml"], ["--template", "boxed"]):
        assert main(["check-task", "my_tasks.Aime", "--data", "aime.jsonl", *flags]) == 0
        assert "│ all                     │       30 │             30 │" in capsys.readouterr().out


@pytest.mark.skipif(not MATH.exists(), reason=f"the MATH data is not at {MATH}")
def test_the_table_of_the_tasks_page_is_what_check_task_prints(capsys):
    (shown,) = blocks("docs/tasks.md", "text")
    assert main(["check-task", "hendrycks_math", "--data", str(MATH)]) == 0
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == shown.splitlines()[1:]


def test_the_tasks_page_names_every_task_and_template():
    page = (ROOT / "docs/tasks.md").read_text()
    assert [name for name in (*TASKS, *TEMPLATES) if f"| `{name}`" not in page] == []


def test_the_figures_of_the_scaling_page_are_what_its_script_prints(capsys):
    (shown,) = blocks("docs/scaling.md", "text")
    runpy.run_path(str(ROOT / "benchmarks/memory_and_traffic.py"))
    assert capsys.readouterr().out == shown


def test_every_local_link_leads_somewhere():
    for page in [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]:
        for target, section in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page.read_text()):
            path = page.parent / target if target else page
            assert path.exists(), f"{page.name} links to {target}"
            assert not section or section in sections(path), f"{page.name} links to {target}#{section}"


def sections(page: Path) -> list[str]:
    """The names that GitHub gives to a page's sections."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


def test_the_quickstarts_pages_show_the_committed_results():
    """The table of each seed and alpha, and README's lowest and highest over seeds."""
    results = [
        [json.loads(line) for line in (ROOT / f"docs/quickstart/results-seed{seed}.jsonl").read_text().splitlines()]
        for seed in range(3)
    ]
    names = {
        "base": "base",
        "SFT (the anchor)": "SFT (anchor)",
        "untrained mixture, best alpha (0.3)": "untrained, best alpha 0.3",
        "fixed mixing: policy alone": "fixed mixing: policy",
        "fixed mixing: mixture": "fixed mixing: mixture",
        "GRPO+KL": "GRPO+KL",
    }
    page, readme = ((ROOT / name).read_text() for name in ("docs/quickstart.md", "README.md"))
    for shown, name in names.items():
        rows = [next(row for row in rows if row.get("name") == name) for rows in results]
        cells = [f"{100 * row['format']:.1f} / {100 * row['answer']:.1f}" for row in rows]
        assert f"| {shown} | {' | '.join(cells)} |" in page
        cells = [spread([100 * row[rate] for row in rows]) for rate in ("format", "answer", "lenient")]
        assert f"| {shown} | {' | '.join(cells)} |" in readme
    for alpha in range(11):
        cells = []
        for rows in results:
            swept = {row["scheme"]: row for row in rows if row["what"] == "sweep" and row["alpha"] == alpha / 10}
            cells.append(" / ".join(f"{100 * swept[scheme]['answer']:.1f}" for scheme in ("logit", "prob")))
        assert f"| {alpha / 10} | {' | '.join(cells)} |" in page


def spread(rates: list[float]) -> str:
    low, high = min(rates), max(rates)
    return f"{low:.0f}" if low == high else f"{low:.1f} to {high:.1f}"


def test_the_pages_use_the_folder_that_the_quickstart_writes():
    folder = QuickstartConfig().output_dir
    models = {"base", "sft", *TITLES}
    paths = set()
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        assert "mv runs/" not in page.read_text(), page.name
        paths |= set(re.findall(r"runs/quickstart[\w/-]*", page.read_text()))
    assert folder in paths
    assert {f"{folder}/{name}" for name in ("base", "sft", "fixed_mixing", "grpo_kl")} <= paths
    assert paths <= {folder, *(f"{folder}/{name}" for name in models)}


def test_every_name_of_the_package_in_the_pages_exists():
    missing = []
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for name in set(re.findall(r"(?<![\w/.-])logitmix(?:\.[A-Za-z_]\w*)+", page.read_text())):
            if not is_in_the_source(name):
                missing.append(f"{page.name}: {name}")
    assert missing == []


def is_in_the_source(name: str) -> bool:
    """Whether the name is a module, or is in one. Read from the source, since `serving` imports vLLM."""
    path, names = ROOT, name.split(".")
    while names and ((path / names[0]).is_dir() or (path / f"{names[0]}.py").is_file()):
        path = path / names.pop(0)
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return not names or re.search(rf"\b{names[0]}\b", source.read_text()) is not None


def test_every_file_of_the_package_in_the_pages_exists():
    """Those in backticks, from the root of the repository or of the package."""
    missing = []
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for path in set(re.findall(r"`((?:\w+/)+\w+\.(?:py|yaml|md))`", page.read_text())):
            if not (ROOT / path).exists() and not (ROOT / "logitmix" / path).exists() and "my_" not in path:
                missing.append(f"{page.name}: {path}")
    assert missing == []
