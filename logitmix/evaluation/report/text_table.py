"""A table of text cells, for the pages and the Markdown of reports."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TextTable:
    """A table of formatted cells; the first column holds names.

    note: a line below the table
    rule: Markdown alignment of all columns but the first
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    rule: str = "---:"

    def markdown(self, heading: str = "###") -> str:
        """The table and its note, below its title if it has one; `heading` marks the title."""
        lines = [self.columns, ["---", *[self.rule] * (len(self.columns) - 1)], *self.rows]
        table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines)
        title = f"{heading} {self.title}\n\n" if self.title else ""
        return f"{title}{table}\n" + (f"\n{self.note}\n" if self.note else "")
