"""Pages: one HTML file each that asks nothing of the network. Jinja escapes whatever a model or a user wrote."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from logitmix.evaluation.inspect import NAMES, Inspection

LEGEND = {
    "both": "the token is the most probable one of policy and of anchor",
    "policy": "of the policy, and not of the anchor",
    "anchor": "of the anchor, and not of the policy",
    "neither": "of neither: only the mix puts it first",
}


def inspection_page(inspection: Inspection, question: str, policy: str, anchor: str) -> str:
    """The page of one response; `policy` and `anchor` say which checkpoints these are."""
    return _render(
        "inspect.html",
        inspection=inspection,
        question=question,
        policy=policy,
        anchor=anchor,
        names=NAMES,
        legend=LEGEND,
        carried=inspection.carried(),
    )


def report_page(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], svgs: Mapping[str, str]) -> str:
    """The page of a report: a table, and the figures as they were written, by name."""
    return _render("report.html", title=title, columns=columns, rows=rows, figures=_drawings(svgs))


def reproduction_page(**values: Any) -> str:
    """The page of a reproduction, from what `templates/reproduction.html` names; `svgs` are the figures, by name."""
    return _render("reproduction.html", figures=_drawings(values.pop("svgs")), **values)


def _drawings(svgs: Mapping[str, str]) -> dict[str, Markup]:
    """Figures as parts of a page: of matplotlib, which escapes its labels, without the prolog of a file."""
    return {name: Markup(svg[svg.index("<svg") :]) for name, svg in svgs.items()}


def visible(text: str) -> str:
    """A token in which blanks can be seen: `␣` for a space, `⏎` for a new line, `⇥` for a tab."""
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
    """A token within the running text: a new line is marked, and breaks the line as well."""
    return Markup('<span class="blank">⏎</span>\n').join(escape(part) for part in text.split("\n"))
