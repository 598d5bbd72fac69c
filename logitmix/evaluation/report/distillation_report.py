"""The report of a distillation: what the student keeps of the mixture, in the terminal and in a folder."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from logitmix.evaluation.complement import Complement
from logitmix.evaluation.decode import get_alphas
from logitmix.evaluation.decoding_cost import DecodingCost, decoding_costs
from logitmix.evaluation.distillation import (
    MIXTURE,
    STUDENT,
    TokenComparison,
    WorstToken,
    compare_tokens,
    compare_with_student,
    compared_models,
    decode_student,
    set_aside_other_report,
    verdict,
)
from logitmix.evaluation.metrics import estimate, group_by, rates
from logitmix.evaluation.report.pages import distillation_page, visible
from logitmix.evaluation.report.tables import RATE_COLUMNS, interval, p_value, percent, print_rows
from logitmix.evaluation.report.text_table import TextTable
from logitmix.evaluation.requests import Response
from logitmix.mixture.generation import tokenize_prompts
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.tasks import Problem, Task

SUMMARY_FILE = "distillation.jsonl"
RATES = "Rates, %"
PAIRED = "The student minus each of the others, points"
TOKENS = "Student and mixture, token by token"
COSTS = "Decoding"
MEMORY = ["weights, MiB", "KV cache a token, KiB"]
WORST = "The tokens where they differ most"


def distillation_tables(
    responses: Sequence[Response],
    comparisons: Mapping[str, Complement],
    tokens: Sequence[TokenComparison],
    costs: Sequence[DecodingCost] = (),
) -> list[TextTable]:
    """The tables of the report, as text cells."""
    groups = group_by(responses, "name")
    rows = []
    for name in dict.fromkeys([STUDENT, MIXTURE, *groups]):
        r = rates(groups[name])
        shares = [interval(estimate(groups[name], key)) for key in ("format_ok", "answer_ok", "lenient_ok")]
        rows.append([name, *shares, percent(r.truncated), f"{r.mean_length:.1f}"])
    paired = []
    for name, c in comparisons.items():
        columns = (c.format, c.answer, c.lenient)
        cells = [f"{interval(column.b_minus_a)}, p {p_value(column.p_value)}" for column in columns]
        paired.append([name, *cells, str(c.only_b), str(c.only_a)])
    by_token = [[c.responses_of, str(c.tokens), f"{c.kl:.4f}", percent(c.agreement)] for c in tokens]
    decoding = []
    for cost in costs:
        memory = f"{cost.weight_bytes / 2**20:,.1f}", f"{cost.cache_bytes / 2**10:,.1f}"
        decoding.append([cost.name, str(cost.responses), f"{cost.tokens_per_second:,.0f}", *memory])
    return [
        TextTable(RATES, ["", *RATE_COLUMNS], rows),
        TextTable(
            PAIRED, ["minus", "format", "answer", "lenient", "only the student right", "only the other"], paired
        ),
        TextTable(TOKENS, ["on responses of", "tokens", "KL(mixture ‖ student)", "same first token, %"], by_token),
        TextTable(COSTS, ["", "responses at a time", "tokens a second", *MEMORY], decoding),
        TextTable(
            WORST,
            ["in a response of", "KL", "problem", "after", "token", "mixture's first", "student's"],
            _worst_rows(tokens),
            rule="---",
        ),
    ]


def _worst_rows(tokens: Sequence[TokenComparison]) -> list[list[str]]:
    """The worst tokens in descending order; where the responses coincide up to one, it is one row of both."""
    found: dict[tuple[int, int, str, str], tuple[WorstToken, list[str]]] = {}
    for c in tokens:
        for t in c.worst:
            found.setdefault((t.problem, t.position, t.before, t.token), (t, []))[1].append(c.responses_of)
    return [
        [", ".join(names), f"{t.kl:.2f}", str(t.problem), *map(visible, (t.before, t.token, t.mixture, t.student))]
        for t, names in sorted(found.values(), key=lambda row: -row[0].kl)
    ]


def report_student(
    student: PreTrainedModel,
    mixture: LogitMixForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    problems: Sequence[Problem],
    folder: Path,
    title: str,
    arguments: Mapping[str, Any],
    max_new_tokens: int | None = None,
    batch_size: int = 64,
) -> str:
    """Decode, compare and time the student and what its mixture is made of; write the report, and return the verdict.

    An interrupted report with the same `arguments` continues; one with others is moved aside.
    """
    set_aside_other_report(folder, arguments)
    responses = decode_student(
        student, mixture, tokenizer, task, problems, str(folder), arguments, max_new_tokens, batch_size
    )
    prompts = [task.prompt(problem) for problem in problems]
    prompt_ids = tokenize_prompts(tokenizer, prompts, task.chat_template_kwargs)
    groups = group_by(responses, "name")
    tokens = [compare_tokens(student, mixture, tokenizer, groups[name], prompt_ids) for name in (MIXTURE, STUDENT)]
    timed: dict[str, tuple[Any, float | None]] = {
        name: (model, None) for name, model in compared_models(student, mixture).items()
    }
    timed |= {name: (mixture, alpha) for name, alpha in get_alphas(mixture).items()}
    costs = decoding_costs(timed, tokenizer, task, problems, max_new_tokens)
    return write_distillation_report(folder, title, responses, compare_with_student(responses), tokens, costs)


def write_distillation_report(
    folder: Path,
    title: str,
    responses: Sequence[Response],
    comparisons: Mapping[str, Complement],
    tokens: Sequence[TokenComparison],
    costs: Sequence[DecodingCost] = (),
) -> str:
    """Write `README.md`, `report.html` and `distillation.jsonl`, print the tables, and return the verdict."""
    tables, sentence = distillation_tables(responses, comparisons, tokens, costs), verdict(comparisons[MIXTURE])
    lines: list[dict] = [{"verdict": sentence}]
    lines += [{"minus": name} | asdict(c) for name, c in comparisons.items()]
    lines += [asdict(c) for c in tokens]
    lines += [{"decoding_of": c.name} | asdict(c) for c in costs]
    (folder / SUMMARY_FILE).write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    (folder / "report.html").write_text(distillation_page(title, sentence, tables), encoding="utf-8")
    parts = [f"# {title}", sentence, *(table.markdown("##").rstrip() for table in tables)]
    (folder / "README.md").write_text("\n\n".join([*parts, NOTE]) + "\n", encoding="utf-8")
    for table in tables[:-1]:
        print_rows(table.title, table.columns, table.rows)
    return sentence


NOTE = (
    "Greedy responses to the same held-out problems. Answer: right and in the format; lenient: right anywhere. "
    "[ ]: 95 % interval; p: McNemar's exact test. KL in nats at temperature 1. "
    "Tokens a second: one measurement of each model after the others, on the machine of the run; a token of the "
    "mixture may take a pass of both members. Memory: the weights that run, and what each token of each response's "
    "context adds to the KV cache; activations are not counted."
)
