"""`logitmix check-task NAME`: the splits of a task, what was dropped, and whether its gold answers grade as right."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from logitmix.cli.options.data import DataArguments
from logitmix.cli.options.parser import parse
from logitmix.tasks.check import check

NUM_UNREAD = 5  # golds that are compared as text only; their number is printed before them
NUM_DUPLICATES = 10  # near-duplicates that are printed; the table has their number


def main(argv: Sequence[str]) -> int:
    """Print a table, some near-duplicates and every failure; return 1 if there is a failure, else 0."""
    description = "Show a task's splits, and check that every gold answer, in the task's template, grades as right."
    return run(parse("check-task", description, DataArguments, argv, positional=("task", "NAME")))


def run(args: DataArguments) -> int:
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
    print(f"failures: {len(failures)}")
    return 1 if failures else 0
