"""HTML pages, each one self-contained file. Jinja escapes everything that a model or a user wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from logitmix.evaluation.report.text_table import TextTable

if TYPE_CHECKING:  # reports need no torch
    from logitmix.evaluation.inspect import Inspection

NUM_COLOURS = 5  # of members, in templates/inspect.html


def inspection_page(inspection: Inspection, question: str, *checkpoints: str) -> str:
    """The page of one response; `checkpoints` are the names of the members' checkpoints, in their order."""
    every, *some, none = inspection.carriers
    styles = {name: f"member_{i % NUM_COLOURS}" for i, name in enumerate(inspection.weights)}
    return _render(
        "inspect.html",
        inspection=inspection,
        question=question,
        checkpoints=dict(zip(inspection.weights, checkpoints, strict=True)),
        names=list(inspection.responses),
        legend=inspection.carriers,
        styles={every: "every", none: "none"} | dict.fromkeys(some, "several") | styles,
        carried=inspection.carried(),
    )


def report_page(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    svgs: Mapping[str, str],
    notes: Sequence[str] = (),
) -> str:
    """The page of a report: a table, notes below it, and the figures by name, as SVG."""
    return _render("report.html", title=title, columns=columns, rows=rows, figures=_embed_svgs(svgs), notes=notes)


def distillation_page(title: str, verdict: str, tables: Sequence[TextTable]) -> str:
    """The page of a distillation: its verdict and its tables."""
    return _render("distillation.html", title=title, verdict=verdict, tables=tables)


def reproduction_page(**values: Any) -> str:
    """The page of a reproduction from the values in `templates/reproduction.html`; `svgs` are the figures, by name."""
    return _render("reproduction.html", figures=_embed_svgs(values.pop("svgs")), **values)


def _embed_svgs(svgs: Mapping[str, str]) -> dict[str, Markup]:
    """SVG elements to embed, without the prolog of a file; matplotlib has escaped their labels."""
    return {name: Markup(svg[svg.index("<svg") :]) for name, svg in svgs.items()}


def visible(text: str) -> str:
    """A token with visible white space: `␣` for a space, `⏎` for a new line, `⇥` for a tab."""
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")


def _render(template: str, **values: Any) -> str:
    environment = Environment(
        loader=PackageLoader("logitmix.evaluation.report"),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    filters: Mapping[str, Any] = {"visible": visible, "shown": _shown, "percent": lambda share: f"{100 * share:.1f}"}
    environment.filters.update(filters, whole=lambda text: text.replace(" %", "\u00a0%"))
    return environment.get_template(template).render(version=version("logitmix"), **values)


def _shown(text: str) -> Markup:
    """A token in running text: a new line is marked, and also breaks the line."""
    return Markup('<span class="blank">⏎</span>\n').join(escape(part) for part in text.split("\n"))
