"""The table of one response's tokens in the terminal: what each member would have written, and who carried it."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from logitmix.evaluation.report.pages import visible
from logitmix.evaluation.report.tables import percent

if TYPE_CHECKING:  # reports need no torch
    from logitmix.evaluation.inspect import Inspection

MEMBER_STYLES = ("blue", "yellow", "green", "cyan", "red")


def print_inspection(inspection: Inspection) -> None:
    """Print a row for each token of the mixture's response, then the response of each model alone."""
    title = f"The mixture at {inspection.setting}: probability of each token, %"
    table, members = Table(title=title, title_justify="left"), list(inspection.weights)
    *_, none = inspection.carriers
    styles = dict(zip(members, itertools.cycle(MEMBER_STYLES), strict=False)) | {none: "magenta"}
    for column in ("token", *inspection.responses, *(f"{name}'s first" for name in members), "carried by"):
        table.add_column(column, justify="right" if column in inspection.responses else "left")
    for token in inspection.tokens:
        probabilities = (percent(token.probabilities[name]) for name in inspection.responses)
        # Text, not str: a model's output may look like markup
        firsts = (Text(visible(token.top[name][0].text)) for name in members)
        style = styles.get(token.carried_by, "")
        who = " + ".join(token.first_of) if token.carried_by == "several" else token.carried_by
        table.add_row(Text(visible(token.text), style), *probabilities, *firsts, Text(who, style))
    console = Console()
    console.print(table)
    for name in inspection.responses:
        console.print(Text(f"{name} alone:" if name != "mixture" else "mixture:", "bold"))
        console.print(Text(inspection.responses[name]), soft_wrap=True)
    counts = ", ".join(f"{name} {count}" for name, count in inspection.carried().items())
    console.print(f"Tokens carried by: {counts}.", highlight=False)
