"""The texts of the page. Whatever comes from a file is escaped: a label may look like HTML."""

from html import escape
from typing import Any

from tahoex1_space.limits import Extent, Limits

_UNKNOWN = "unknown"


def introduction(model: str, limits: Limits, label: str) -> str:
    """Return the text at the top of the page, as Markdown."""
    return f"""# Embed and annotate cells with Tahoe-x1

Upload human cells with raw counts, as an `.h5ad` file of AnnData or scanpy. You get each cell's embedding by
`{model}`, a UMAP of them, and for each cell the label (`{label}`) of the nearest cells of a reference, with its
probability.

- **Limits**: {limits.megabytes:,} MB, {limits.cells:,} cells, {limits.genes:,} genes, {limits.minutes} minutes. For
  more, use `tahoex1 embed` and `tahoex1 annotate` on your own machine.
- **Your data**: nothing is kept. Your file is removed when its work ends, the result when you close this page, and
  both after half an hour at the latest. Still, upload nothing that you may not share.
- **For research**, not for diagnosis. A label is only as good as the reference suits your tissue; the report says what
  to expect.
"""


def accepted(name: str, extent: Extent, seconds: float) -> str:
    """Say that a file is taken."""
    minutes = max(1, round(seconds / 60 + 0.4))
    time = "about a minute" if minutes == 1 else f"about {minutes} minutes"
    size = f"{extent.cells:,} cells × {extent.genes:,} genes"
    return f"<p>{escape(name)}: {size}, taken. The work takes {time} once it has begun.</p>"


def waiting(ahead: int) -> str:
    """Say how much other work must end first."""
    others = "1 piece of work of others is" if ahead == 1 else f"{ahead} pieces of work of others are"
    return f"<p>Waiting: {others} before yours.</p>"


def progress(title: str, done: int, total: int) -> str:
    """Say how far a step is."""
    if not total:
        return f"<p>{escape(title)} …</p>"
    text = f"{escape(title)}: {done:,} of {total:,}"
    return f'<p>{text}</p><progress max="{total}" value="{done}" aria-label="{text}"></progress>'


def problem(message: str) -> str:
    """Return the text of an error."""
    return f"<p><strong>This did not work.</strong> {escape(message)}</p>"


def result(found: dict[str, Any]) -> str:
    """Return the picture, the table of labels, and what there is to know, as HTML."""
    labels, number, genes = found["labels"], f"{found['number']:,}", f"{found['genes']:,}"
    parts = ["<h2>Result</h2>", f"<p>{number} cells, {genes} of whose genes the model knows.</p>"]
    if found["picture"] is None:
        parts.append("<p>There are too few cells for a UMAP.</p>")
    else:
        by = ", coloured by label; the table gives the number of cells of each" if labels else ""
        alt = f"UMAP of the embeddings of {number} cells{by}."
        parts.append(f'<img src="data:image/png;base64,{found["picture"]}" alt="{alt}" style="max-width: 100%">')
    if labels:
        parts.append(_table(labels, found["number"]))
    if found["notes"]:
        notes = "".join(f"<li>{escape(note)}</li>" for note in found["notes"])
        parts.append(f"<h3>What to know</h3><ul>{notes}</ul>")
    return "".join(parts)


def _table(labels: list[list[Any]], number: int) -> str:
    rows = [
        f"<tr><th scope='row'>{escape(label)}</th>"
        f"<td>{cells:,}</td><td>{cells / number:.1%}</td><td>{mean:.2f}</td></tr>"
        for label, cells, mean in labels
    ]
    far = f" “{_UNKNOWN}” means: far from all cells of the reference."
    caption = "Cells by label." + (far if any(label == _UNKNOWN for label, *_ in labels) else "")
    heads = "".join(f"<th scope='col'>{head}</th>" for head in ("label", "cells", "share", "mean probability"))
    return f"<table><caption>{caption}</caption><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
