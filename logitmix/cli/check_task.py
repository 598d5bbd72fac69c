"""`logitmix check-task NAME`: the splits of a task, what was dropped, and whether its gold answers grade as right.

With a model, also how well it follows each template.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from rich.console import Console
from rich.table import Table

from logitmix.cli.options.data import RenderedDataArguments
from logitmix.cli.options.parser import parse
from logitmix.cli.options.validation import validate_at_least
from logitmix.tasks import Task
from logitmix.tasks.check import check
from logitmix.tasks.templates import TEMPLATES

NUM_UNREAD = 5  # golds that are compared as text only; their number is printed before them
NUM_DUPLICATES = 10  # near-duplicates that are printed; the table has their number


@dataclass
class TrialArguments:
    """Trial of the templates with a model"""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or hub id of a model to try under every template; default: none."}
    )
    num_questions: int = field(default=20, metadata={"help": "Validation questions to decode under each template."})
    max_new_tokens: int = field(default=128, metadata={"help": "Longest response, in tokens."})

    def __post_init__(self) -> None:
        validate_at_least(self, num_questions=1, max_new_tokens=1)
        for f in fields(self):
            if self.model_name_or_path is None and getattr(self, f.name) != f.default:
                raise ValueError(
                    f"{f.name} is {getattr(self, f.name)}, but no model is tried; add --model_name_or_path"
                )


@dataclass
class CheckTaskOptions:
    task: RenderedDataArguments
    trial: TrialArguments


def main(argv: Sequence[str]) -> int:
    """Print a table, some near-duplicates and every failure; return 1 if there is a failure, else 0."""
    description = "Show a task's splits, and check that every gold answer, in the task's template, grades as right."
    return run(parse("check-task", description, CheckTaskOptions, argv, positional=("task", "NAME")))


def run(options: CheckTaskOptions) -> int:
    args = options.task
    task = args.load()
    checked = check(task)
    table = Table(title=f"{task.name}, template {task.template.name}, seed {args.split_seed}", title_justify="left")
    table.add_column("", no_wrap=True)
    for column in ("problems", "golds accepted"):
        table.add_column(column, justify="right")
    for part in checked:
        table.add_row(part.name, f"{part.problems:,}", f"{part.accepted:,}")
    table.add_section()
    problems, accepted = (sum(getattr(part, name) for part in checked) for name in ("problems", "accepted"))
    table.add_row("all", f"{problems:,}", f"{accepted:,}")
    Console().print(table)
    if task.left_out:
        print(f"{task.left_out:,} rows are left out: they are not problems of this task.")
    for problem in task.dropped.get("near-duplicates of test", ())[:NUM_DUPLICATES]:
        print(f"dropped, nearly in test: {' '.join(problem.question.split())[:100]}")
    texts = [text for part in checked for text in part.unread]
    if texts:
        print(f"{len(texts):,} golds are compared as text only, since the verifier does not read them; the first:")
        for text in texts[:NUM_UNREAD]:
            print(text[:160])
    failures = [failure for part in checked for failure in part.failures]
    for failure in failures:
        print(failure)
    if options.trial.model_name_or_path is not None:
        print_trials(task, options.trial.model_name_or_path, options.trial)
    print(f"failures: {len(failures)}")
    return 1 if failures else 0


def print_trials(task: Task, source: str, args: TrialArguments) -> None:
    """Decode the first validation questions under the task's template and all others, and print a row for each."""
    from accelerate import PartialState

    from logitmix.cli.options.model import find_model
    from logitmix.evaluation.explanations import explain
    from logitmix.evaluation.report.tables import print_notes, print_trial_rates
    from logitmix.evaluation.template_trials import try_templates
    from logitmix.mixture.loading import load_member, require_tokenizer
    from logitmix.runs.console import progress_bar

    source = find_model(source)
    tokenizer = require_tokenizer(source)
    model = load_member(source).to(PartialState().device).eval()
    problems = task.problems("validation", args.num_questions)
    others = [template for template in TEMPLATES.values() if template.name != task.template.name]
    templates = [task.template, *others]
    trials = []
    with progress_bar() as bar:
        shown = bar.add_task("templates", total=len(templates), info="")
        for trial in try_templates(model, tokenizer, task, problems, templates, args.max_new_tokens):
            trials.append(trial)
            bar.advance(shown)
    print_trial_rates(f"{source} on {len(problems)} validation questions, greedy", trials)
    print_notes(explain([response for trial in trials for response in trial.responses]))
    print_notes([f"{trial.template}: refused, since {trial.refusal}" for trial in trials if trial.refusal])
