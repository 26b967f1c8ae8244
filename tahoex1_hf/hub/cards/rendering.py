# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Render a model card from its facts: Markdown for the Hub, and HTML to look at.

The metadata go through huggingface_hub's ModelCard. `ModelCard.validate` asks the Hub, so `check_card` checks what can
be checked offline.
"""

import html
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from tahoex1_hf.hub.cards.checking import check_facts
from tahoex1_hf.hub.cards.facts import RELEASED_FACTS, Facts, load_facts

TEMPLATE = Path(__file__).with_name("template.md.jinja")
ORIGINAL_REPO = "tahoebio/Tahoe-x1"
LIBRARY, PIPELINE_TAG = "transformers", "feature-extraction"


def card_text(size: str, folder: Path, card: Path | None, *, subfolder: str, repo_id: str | None) -> str | None:
    """Return the text of a size's README.md; None if nothing is known about the size.

    It comes from the first of these that exists: `card`; the facts of the released size of that name; the README.md in
    `folder`.

    Args:
        size: Name of the size.
        folder: Converted checkpoint.
        card: Facts (`.yaml`), or a ready README.
        subfolder: Folder of this size in the repository; "" for its root.
        repo_id: Hub repository that the card is for; by default that of the original.

    Raises:
        FileNotFoundError: If `card` does not exist.
        ValueError: As for `render_card`, and for facts of a model of another shape, or another number of parameters.
    """
    card = card or RELEASED_FACTS.get(size)
    if card is None:
        ready = folder / "README.md"
        return ready.read_text(encoding="utf-8") if ready.is_file() else None
    if not card.is_file():
        raise FileNotFoundError(f"card={str(card)!r} is not a file: pass facts (.yaml) or a README (.md).")
    if card.suffix not in (".yaml", ".yml"):
        return card.read_text(encoding="utf-8")
    check_facts(load_facts(card), card, folder)
    return render_card(card, repo_id=repo_id or ORIGINAL_REPO, subfolder=subfolder)


def render_card(facts: str | Path, *, repo_id: str = ORIGINAL_REPO, subfolder: str = "") -> str:
    """Return a model card's text, metadata included.

    Args:
        facts: Path of the facts file.
        repo_id: Hub repository that the card is for, which its examples name.
        subfolder: Folder of this size in the repository; "" for its root.

    Raises:
        ValueError: For facts, names or metadata that can't be used.
    """
    import jinja2  # imported here, so that looking a model up does not wait for it

    known = load_facts(facts)
    metadata = card_data(known, repo_id)
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"gb": gigabytes, "seconds": seconds, "short": short, "thousands": "{:,}".format}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    text = template.render(
        card_data=metadata.to_yaml(),
        facts=known,
        shape=known.shape,
        model_id=known.model_path or repo_id,
        subfolder=subfolder,
    )
    check_card(text)
    return text


def gigabytes(num_bytes: float) -> str:
    """Write bytes as GB (1e9 bytes), or MB below 0.1 GB, with two or three figures."""
    unit, size = ("GB", num_bytes / 1e9) if num_bytes >= 1e8 else ("MB", num_bytes / 1e6)
    return f"{size:.2f} {unit}" if size < 10 else f"{size:.1f} {unit}"


def short(number: float) -> str:
    """Write a number with three figures: 11,700, 1.25, 0.0333, 3e-5."""
    if number >= 1000:
        return f"{float(f'{number:.3g}'):,.0f}"
    digits, _, exponent = f"{number:.3g}".partition("e")
    if 0 < number < 0.001:
        digits, _, exponent = f"{number:.2e}".partition("e")
        digits = digits.rstrip("0").rstrip(".")
    return f"{digits}e{int(exponent)}" if exponent else digits


def seconds(number: float) -> str:
    """Write a time in s, or in ms below a tenth of a second."""
    return f"{short(number)} s" if number >= 0.1 else f"{short(1000 * number)} ms"


def card_data(facts: Facts, repo_id: str) -> ModelCardData:
    """Return the metadata of the card, by which the Hub filters."""
    results = [
        EvalResult(
            task_type=result.task_type,
            task_name=result.task,
            dataset_type=str(result.dataset_id),
            dataset_name=result.dataset or str(result.dataset_id),
            metric_type=result.metric,
            metric_value=result.value,
            source_name=result.source,
            source_url=result.url,
        )
        for result in facts.results
        if result.task_type
    ]
    return ModelCardData(
        license=facts.license,
        library_name=LIBRARY,
        pipeline_tag=PIPELINE_TAG,
        tags=facts.tags,
        datasets=[data.hub_id for data in facts.data if data.hub_id] or None,
        # A copy of the released weights names the repository it comes from; that repository itself has no base.
        base_model=ORIGINAL_REPO if facts.released and repo_id != ORIGINAL_REPO else None,
        eval_results=results or None,
        model_name=facts.title if results else None,
    )


def check_card(text: str) -> ModelCard:
    """Parse a card as huggingface_hub does, and check what can be checked offline.

    Only `ModelCard.validate` can tell whether the Hub knows the license, the tags and the datasets.

    Raises:
        ValueError: If the metadata or the heading have a fault; the message names it.
    """
    card = ModelCard(text)
    data: Any = card.data  # a ModelCardData, which huggingface_hub types as its base class
    for name in ("license", "library_name", "pipeline_tag", "tags"):
        if not getattr(data, name):
            raise ValueError(f"The card's metadata lack {name}.")
    for name in ("datasets", "base_model"):
        value = getattr(data, name) or []
        for repo_id in [value] if isinstance(value, str) else value:
            try:
                validate_repo_id(repo_id)
            except HFValidationError as error:
                raise ValueError(f"{name}: {repo_id!r} can't be the id of a repository: {error}") from error
    for result in data.eval_results or []:
        if not str(result.source_url or "").startswith("https://"):
            raise ValueError(f"model-index: {result.task_name or result.task_type} has no source.")
    if not card.text.strip().startswith("# "):
        raise ValueError("The card must start with a heading.")
    return card


def to_html(text: str) -> str:
    """Return an HTML page that shows the card much as the Hub does: the metadata as chips, then the text.

    Raises:
        ImportError: If markdown-it-py is not installed.
        ValueError: As for `check_card`.
    """
    from markdown_it import MarkdownIt

    card = check_card(text)
    data = card.data.to_dict()
    values = [data["pipeline_tag"], data["library_name"], *data.get("datasets", []), *data["tags"]]
    values += [f"License: {data['license']}"]
    chips = "".join(f'<span class="chip">{html.escape(str(value))}</span>' for value in values)
    body = MarkdownIt("commonmark").enable("table").render(card.text)
    body = body.replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")
    style = Path(__file__).with_name("card.css").read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Model card</title>'
        f'<meta name="viewport" content="width=device-width"><style>{style}</style></head>'
        f'<body><div class="chips">{chips}</div><article>{body}</article></body></html>\n'
    )
