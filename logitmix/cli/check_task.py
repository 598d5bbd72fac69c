"""`logitmix check-task NAME`: a task's splits, the problems it drops, and whether its golds grade as right."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from logitmix.cli.options.data import DataArguments
from logitmix.cli.options.parser import parse
from logitmix.tasks.check import check

SHOWN = 10  # near-duplicates to print; the table has their number


def main(argv: Sequence[str]) -> int:
    """Print the table, some near-duplicates and every failure. The exit status is 1 if there is a failure."""
    if argv and not argv[0].startswith("-"):
        argv = ["--task", *argv]
    (args,) = parse(
        "logitmix check-task NAME",
        "A task's splits, and whether every gold, written in the task's template, is graded as right.",
        (DataArguments,),
        argv,
    )
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
        print(f"{task.left_out:,} rows are left out: they are no problem of this task.")
    for problem in task.dropped.get("near-duplicates of test", ())[:SHOWN]:
        print(f"dropped, nearly in test: {' '.join(problem.question.split())[:100]}")
    failures = [failure for part in checked for failure in part.failures]
    for failure in failures:
        print(failure)
    print(f"failures: {len(failures)}")
    return 1 if failures else 0
