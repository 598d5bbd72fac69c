"""Recipes: their values, how flags and config files override them, and what their dry runs print and reject."""

import json
import string
from dataclasses import fields

import pytest
import torch
import yaml
from transformers import AutoConfig

from logitmix.cli.__main__ import main
from logitmix.cli.options.parser import build
from logitmix.cli.sft import SFTOptions, parse_sft
from logitmix.cli.train import TrainOptions, parse_train
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.paper.quickstart_config import QuickstartConfig
from logitmix.paper.recipes import (
    ARMS,
    CELLS,
    EXTRA_ARMS,
    EXTRA_TITLES,
    FOLDER,
    NAMES,
    PAPER_CELLS,
    SOURCES,
    TITLES,
    load_recipe,
)
from logitmix.paper.tiny_model import character_tokenizer, tiny_model
from logitmix.tasks import Arithmetic
from logitmix.training.budget import Batches
from logitmix.training.model_shape import model_shape

LAYERS = sorted(path.relative_to(FOLDER) for path in FOLDER.rglob("*.yaml"))
# the arms beyond the paper differ from fixed mixing in no size
TESTED = [name for name in NAMES if not name.endswith(EXTRA_ARMS) or name.startswith(("math/3b/", "arithmetic/"))]
PAPER_RUNS = [f"{cell}/{arm}" for cell in PAPER_CELLS for arm in ARMS]


def error_of(capsys, argv) -> str:
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


def parsed(name: str, *flags: str) -> list:
    """The groups of options of a recipe's command."""
    parse = parse_sft if name.endswith("/sft") else parse_train
    return list(vars(parse(["--recipe", name, "--dry_run", *flags])).values())


def test_every_run_of_the_paper_has_a_recipe():
    assert len(PAPER_RUNS) == 9 * 6
    assert set(ARMS) == {"grpo_kl", "grpo", "fixed_mixing", "adaptive_mixing", "base_anchor", "prob_mixing"}
    assert {*PAPER_RUNS, *(f"{cell}/sft" for cell in PAPER_CELLS)} < set(NAMES)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_every_value_names_its_source(layer):
    content = yaml.safe_load((FOLDER / layer).read_text())
    sections = [content] if layer.parts[0] not in ("models", "tasks") else [
        section for name, section in content.items() if name != "config"
    ]  # fmt: skip
    for key, entry in ((key, entry) for section in sections for key, entry in section.items()):
        _, source, *reason = entry
        assert source in SOURCES, key
        assert reason or source != "O", f"{key} is our choice, without a reason"
        assert len(reason) <= 1, f"{key}: a reason with a comma needs quotes"
        assert all(isinstance(text, str) and text for text in reason), key


@pytest.mark.parametrize("name", TESTED)
def test_every_key_is_a_flag_and_every_value_reaches_it(name):
    instances = parsed(name)
    for key, value in load_recipe(name).values.items():
        (owner,) = [instance for instance in instances if key in {f.name for f in fields(instance)}]
        wanted = value.value.replace("{model_name_or_path}", "Qwen") if isinstance(value.value, str) else value.value
        actual = getattr(owner, key)
        assert actual == wanted or (wanted == "Qwen" and actual == instances[2].model_name_or_path), key
        assert instances[0].sources[key] == str(value)


@pytest.mark.parametrize("name", TESTED)
def test_options_built_without_a_command_line_equal_the_parsed_ones(name, tmp_path):
    """As `logitmix reproduce` builds them."""
    parse, options = (parse_sft, SFTOptions) if name.endswith("/sft") else (parse_train, TrainOptions)
    settings = {"use_cpu": True, "bf16": False, "seed": 3, "output_dir": str(tmp_path), "max_steps": 2}
    settings |= {"resume_from_checkpoint": "true", "model_name_or_path": "here/qwen"}
    flags = [string for key, value in settings.items() for string in (f"--{key}", str(value))]
    built, expected = build(options, name, settings), parse(["--recipe", name, *flags])
    assert list(vars(built)) == list(vars(expected))
    for group in vars(built):
        found, wanted = getattr(built, group), getattr(expected, group)
        assert vars(found) == vars(wanted) if group != "training" else found.to_dict() == wanted.to_dict()


@pytest.mark.parametrize("name", PAPER_RUNS)
def test_a_run_is_40_outer_steps_of_2048_rollouts_in_8_updates(name):
    recipe_args, task_args, *_, eval_args, args = parsed(name)
    batches = Batches(
        args.per_device_train_batch_size, args.gradient_accumulation_steps, args.steps_per_generation,
        args.num_iterations, args.num_generations, recipe_args.processes,
    )  # fmt: skip
    assert (batches.rollouts_per_outer_step, batches.rollouts_per_update, args.num_generations) == (2048, 256, 8)
    assert args.max_steps == 40 * batches.updates_per_outer_step == 320
    assert (eval_args.eval_every, task_args.eval_limit) == (8, 500)


@pytest.mark.parametrize("cell", PAPER_CELLS)
def test_an_anchor_is_made_of_768_examples_16_an_update(cell):
    _, task_args, *_, args = parsed(f"{cell}/sft")
    assert (task_args.train_limit, args.num_train_epochs) == (768, 1)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 16


def test_arms_differ_only_in_what_defines_them():
    recipes = {arm: load_recipe(f"math/3b/{arm}").values for arm in ARMS}
    common = {key for key in recipes["grpo"] if all(recipes[arm].get(key) == recipes["grpo"][key] for arm in ARMS)}
    defining = {"model_name_or_path", "anchor", "alpha", "scheme", "loss_type", "beta", "output_dir"}
    adaptive = {"alpha_controller", "validation_size", "validation_source", "adaptive_offset", "adaptive_scale"}
    assert {key for arm in ARMS for key in recipes[arm]} - common == defining | adaptive

    def chosen(arm: str) -> tuple:
        return tuple(
            recipes[arm][key].value if key in recipes[arm] else None
            for key in ("model_name_or_path", "anchor", "alpha", "scheme", "loss_type", "beta")
        )

    base, sft = "Qwen/Qwen2.5-3B-Instruct", "runs/math/3b/sft"
    assert {arm: chosen(arm) for arm in ARMS} == {
        "grpo_kl": (sft, None, None, None, "grpo", 0.01),
        "grpo": (sft, None, None, None, "grpo", 0.0),
        "fixed_mixing": (base, sft, 0.5, "logit", "group", 0.0),
        "adaptive_mixing": (base, sft, 0.5, "logit", "group", 0.0),
        "base_anchor": (base, "{model_name_or_path}", 0.5, "logit", "group", 0.0),
        "prob_mixing": (base, sft, 0.5, "prob", "group", 0.0),
    }


def test_the_adaptive_arm_has_equation_9s_numbers_and_the_toy_scales_them():
    def numbers(cell: str) -> list:
        values = load_recipe(f"{cell}/adaptive_mixing").values
        return [values[key].value for key in ("adaptive_offset", "adaptive_scale", "validation_size")]

    paper, toy = numbers("cn_k12/7b"), numbers("arithmetic/tiny")
    assert paper == [25, 35, 100]
    assert [n / toy[2] for n in toy] == [n / paper[2] for n in paper]


def test_flags_override_the_config_file_which_overrides_the_recipe(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("alpha: 0.25\nlearning_rate: 3.0e-6\n")
    recipe_args, *_, args = parsed("math/3b/fixed_mixing", "--config", str(file), "--learning-rate", "2e-6")
    assert (args.scheme, args.alpha, args.learning_rate) == ("logit", 0.25, 2e-6)
    sources = recipe_args.sources
    assert sources["scheme"].startswith("arms/fixed_mixing: paper")
    assert (sources["alpha"], sources["learning_rate"]) == ("config file", "flag")


def test_the_base_anchor_is_the_given_model():
    assert parsed("math/3b/base_anchor")[-1].anchor == "Qwen/Qwen2.5-3B-Instruct"
    assert parsed("math/3b/base_anchor", "--model_name_or_path", "here/qwen")[-1].anchor == "here/qwen"


@pytest.mark.parametrize("started", [False, True])
def test_processes_divide_the_rollouts_of_an_update(started, monkeypatch):
    if started:
        # not by WORLD_SIZE, at which torch would wait for the other seven
        monkeypatch.setattr("logitmix.cli.options.parser.launched_processes", lambda: 8)
        args = parsed("math/7b/fixed_mixing")[-1]
    else:
        args = parsed("math/7b/fixed_mixing", "--num_processes", "8")[-1]
    assert 8 * args.per_device_train_batch_size * args.gradient_accumulation_steps == 256
    assert 8 * args.per_device_train_batch_size * args.steps_per_generation == 2048


def test_a_number_of_processes_that_does_not_divide_the_batch_is_rejected(capsys):
    message = error_of(capsys, ["train", "--recipe", "math/3b/grpo", "--dry_run", "--num_processes", "3"])
    assert "which 3 processes cannot share equally; use a number of processes that divides it: 1, 2, 4, 8" in message


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--recipe", "math/3b/fixed_mix"], "did you mean 'math/3b/fixed_mixing'? `logitmix recipes` lists"),
        (["train", "--recipe", "math/3b/sft"], "is a recipe for `logitmix sft`, not for `logitmix train`"),
        (["sft", "--recipe", "math/3b/grpo"], "is a recipe for `logitmix train`, not for `logitmix sft`"),
        (["train", "--recipe"], "expected one argument"),
        (["train", "--recipe", "arithmetic/tiny/grpo", "--device_memory", "80GiB"], "is for --dry_run alone"),
        (["train", "--recipe", "math/3b/grpo", "--dry_run", "--device_memory", "lots"], "write it as 80GiB"),
        (["train", "--recipe", "math/3b/grpo", "--dry_run", "--model_name_or_path", "no/such"], "no config.json at"),
        (["train", "--recipe", "math/3b/grpo", "--dry_run", "--num_processes", "0"], "--num_processes is 0, but must"),
        (
            ["train", "--recipe", "math/3b/grpo", "--dry_run", "--prompt_length", "-1"],
            "--prompt_length is -1, but must",
        ),
        (
            ["sft", "--recipe", "math/3b/sft", "--dry_run", "--anchor", "sft"],
            "'anchor' on the command line; `logitmix sft --help`",
        ),
        (["recipes", "math"], "takes no arguments but --fits SIZE, got 'math'"),
    ],
)
def test_wrong_input_prints_one_error_line(argv, message, capsys):
    assert message in error_of(capsys, argv)


@pytest.mark.parametrize("arm", ["fixed_mixing", "grpo_kl"])
def test_a_run_before_its_sft_stage_names_the_command_for_it(arm, tmp_path, monkeypatch, capsys):
    """Both where the SFT model is the anchor and where the policy starts from it."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--recipe", f"arithmetic/tiny/{arm}", "--use_cpu", "true"]) == 2
    assert "make it with `logitmix sft --recipe arithmetic/tiny/sft`" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_names_are_listed(capsys):
    assert main(["recipes"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*CELLS, *ARMS, *EXTRA_ARMS, "sft"))


@pytest.mark.parametrize("name", TESTED)
def test_every_recipe_dry_runs_within_80_gib(name, tmp_path, monkeypatch, capsys):
    """1.5B and 3B on one device; 7B on eight that share the weights, and its anchor on one."""
    monkeypatch.chdir(tmp_path)
    verb = load_recipe(name).verb
    devices = ["--num_processes", "8", "--sharded"] if "/7b/" in name and verb == "train" else []
    assert main([verb, "--recipe", name, "--dry_run", "--device_memory", "80GiB", *devices]) == 0
    printed = capsys.readouterr().out
    assert name in printed
    assert "at most at a time" in printed
    assert list(tmp_path.iterdir()) == [], "a dry run leaves nothing behind"


@pytest.mark.parametrize(
    ("flags", "way_out"),
    [
        (["math/7b/fixed_mixing"], "spread its weights over more devices with FSDP"),
        (["math/3b/fixed_mixing", "--rollout_batch_size", "256"], "lower --rollout_batch_size, which is 256"),
        (["math/3b/fixed_mixing", "--per_device_train_batch_size", "16"], "lower --per_device_train_batch_size"),
        (["math/3b/grpo", "--gradient_checkpointing", "false"], "set --gradient_checkpointing true"),
    ],
)
def test_a_run_that_does_not_fit_is_rejected_with_a_way_out(flags, way_out, capsys):
    message = error_of(capsys, ["train", "--dry_run", "--device_memory", "80GiB", "--recipe", *flags])
    assert "GiB on one device, which has 80.0 GiB" in message
    assert way_out in message


def test_without_a_gpu_the_memory_needed_is_printed(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["train", "--recipe", "math/7b/fixed_mixing", "--dry_run"]) == 0
    assert "175." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "parameters"), [("1.5b", 1_543_714_304), ("3b", 3_085_938_688), ("7b", 7_615_616_512)]
)
def test_the_models_have_as_many_parameters_as_their_checkpoints(model, parameters):
    """The totals in the index files of the checkpoints on the hub."""
    config = AutoConfig.for_model(**load_recipe(f"math/{model}/sft").model_config)
    assert model_shape(config).parameters == parameters


def test_the_tiny_model_of_the_recipes_is_the_quickstarts():
    config = AutoConfig.for_model(**load_recipe("arithmetic/tiny/sft").model_config)
    assert model_shape(config) == model_shape(tiny_model(len(character_tokenizer(Arithmetic.alphabet))).config)


def test_the_defaults_of_the_quickstart_are_those_of_its_recipes():
    assert set(TITLES) == set(ARMS)
    assert set(EXTRA_TITLES) == {*EXTRA_ARMS, "distilled"}
    values = load_recipe("arithmetic/tiny/adaptive_mixing").values
    defaults = {f.name: f.default for f in fields(QuickstartConfig)}
    assert defaults["rl_steps"] == values["max_steps"].value
    assert defaults["questions"] * defaults["num_generations"] == values["per_device_train_batch_size"].value
    assert defaults["rl_learning_rate"] == values["learning_rate"].value
    for key in ("alpha", "seed", "num_generations", "eval_limit", "eval_every"):
        assert defaults[key] == values[key].value
    assert defaults["sft_steps"] == load_recipe("arithmetic/tiny/sft").values["max_steps"].value


SMALL = [
    "--use_cpu", "true", "--bf16", "false", "--max_steps", "2", "--per_device_train_batch_size", "4",
    "--gradient_accumulation_steps", "2", "--steps_per_generation", "4", "--num_generations", "4",
    "--max_completion_length", "8", "--eval_every", "2", "--eval_limit", "3", "--save_strategy", "no",
]  # fmt: skip


@pytest.fixture(scope="module")
def members(tmp_path_factory) -> tuple[str, str]:
    folder, tokenizer = tmp_path_factory.mktemp("members"), character_tokenizer(string.printable)
    for seed, name in enumerate(("base", "sft")):
        torch.manual_seed(seed)
        model = tiny_model(len(tokenizer))
        model.config.max_position_embeddings = 2048  # the prompts are longer than arithmetic's
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return str(folder / "base"), str(folder / "sft")


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("data")
    for split, numbers in (("train", range(140)), ("test", range(200, 210))):
        rows = [{"problem": f"What is {n} + {n}?", "solution": f"It is $\\boxed{{{2 * n}}}$."} for n in numbers]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_trains_two_steps_on_small_members(arm, members, problems, tmp_path):
    base, sft = members
    mixes = "anchor" in load_recipe(f"math/3b/{arm}").values
    models = ["--model_name_or_path", base if mixes else sft]
    if mixes and arm != "base_anchor":
        models += ["--anchor", sft]
    out = tmp_path / "run"
    flags = [*models, "--data", problems, "--output_dir", str(out), *SMALL]
    assert main(["train", "--recipe", f"math/3b/{arm}", *flags]) == 0

    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [log["step"] for log in metrics if "loss" in log] == [1, 2]
    rows = [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]
    names = ["policy", "anchor", "mixture"] if mixes else ["model"]
    assert sorted((r["step"], r["name"]) for r in rows) == sorted((step, n) for step in (0, 2) for n in names)
    assert {row["n"] for row in rows} == {3}
    run = json.loads((out / "run.jsonl").read_text())["arguments"]
    assert run["recipe"] == f"math/3b/{arm}"
    config = AutoConfig.from_pretrained(out)
    assert config.model_type == ("logitmix" if mixes else "qwen2")
    if mixes:
        mixture = LogitMixForCausalLM.from_pretrained(out)
        assert mixture.config.scheme == ("prob" if arm == "prob_mixing" else "logit")
        assert (mixture.alpha == 0.5) == (arm != "adaptive_mixing")
