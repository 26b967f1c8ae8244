# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The page's parts, and the HTML that is made of them: one file without scripts, which loads nothing from elsewhere.

Everything that comes from a file goes through the template, which escapes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tahoex1_hf.reporting.figures import Figure

TEMPLATE = Path(__file__).with_name("page.html.jinja")


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows.

    Attributes:
        caption: Text above it.
        header: Names of the columns; empty for a list of facts.
        rows: Texts of each row.
        numbers: Columns that hold numbers, by their place.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[int] = ()


@dataclass(frozen=True)
class Part:
    """A paragraph, note, command, table or picture; `kind` says which.

    Attributes:
        kind: `text`, `warning`, `code`, `table` or `figure`.
        text: Text of the first three.
        table: The table.
        figure: The picture.
    """

    kind: str
    text: str = ""
    table: Table | None = None
    figure: Figure | None = None


@dataclass
class Section:
    """A section of the page.

    Attributes:
        title: Heading.
        parts: What stands below it, in order.
    """

    title: str
    parts: list[Part] = field(default_factory=list)

    def add(self, content: str | Table | Figure, kind: str = "text") -> None:
        """Add a text of some kind, a table or a picture."""
        if isinstance(content, Table):
            self.parts.append(Part("table", table=content))
        elif isinstance(content, Figure):
            self.parts.append(Part("figure", figure=content))
        else:
            self.parts.append(Part(kind, text=content))


def render(title: str, lead: str, sections: Sequence[Section]) -> str:
    """Return the page as HTML.

    Args:
        title: Heading of the page.
        lead: Sentence below it.
        sections: Sections, in order.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(title=title, lead=lead, sections=sections)
