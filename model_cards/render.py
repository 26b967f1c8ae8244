"""Render a model card from a facts file, as Markdown for the Hub and, to look at it, as HTML.

    python model_cards/render.py FACTS.yaml [OUTPUT] [--repo-id ID] [--subfolder NAME] [--html FILE]

The facts are typed and strict: an unknown or missing key, or a value of another type, is an error. The metadata go
through huggingface_hub's ModelCard; what it can't check without the network (`ModelCard.validate` asks the Hub) is
checked by `check_card` as far as that goes offline.
"""

import difflib
import html
import types
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import jinja2
import typer
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

TEMPLATE = Path(__file__).with_name("template.md.jinja")
ORIGINAL_REPO = "tahoebio/Tahoe-x1"
LIBRARY, PIPELINE_TAG = "transformers", "feature-extraction"


@dataclass(frozen=True)
class Shape:
    """Arguments of `TahoeX1Config` that make this size."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str
    expression_decoder_act: str
    attention_mask_style: str
    num_drugs: int = 0
    drug_token_id: int | None = None

    def embedding_flops(self, tokens: int) -> float:
        """Operations that one cell of so many tokens needs to be embedded, two per multiplication.

        As `benchmarks.__main__.embedding_flops`, for heads that are not grouped and a feed-forward block of 4 d.
        """
        d, layers = self.hidden_size, self.num_hidden_layers
        return 2.0 * (tokens * (layers * 12 * d * d + d * d) + tokens**2 * layers * 2 * d)


@dataclass(frozen=True)
class DataSet:
    name: str
    cells: str
    description: str
    hub_id: str | None = None


@dataclass(frozen=True)
class Stage:
    """One run of the training; the weight decay is Composer's decoupled one, p *= 1 - (lr / lr0) wd."""

    name: str
    cells_per_step: int
    learning_rate: float
    schedule: str
    decoupled_weight_decay: float
    epochs: int
    context: int

    @property
    def torch_weight_decay(self) -> float:
        """The same decay as torch's AdamW counts it."""
        return self.decoupled_weight_decay / self.learning_rate


@dataclass(frozen=True)
class Measurement:
    what: str
    value: str
    where: str


@dataclass(frozen=True)
class Result:
    """A result and who says so. With `task_type`, `dataset_id` and `url` it goes into the Hub's model-index too."""

    task: str
    metric: str
    value: str | float
    source: str
    url: str | None = None
    task_type: str | None = None
    dataset_id: str | None = None
    dataset: str | None = None


@dataclass(frozen=True)
class Facts:
    title: str
    size: str
    released: bool
    summary: str
    parameters: int
    shape: Shape
    context: int
    num_bins: int
    attention_mask: str
    drug_token: str
    data: list[DataSet]
    data_note: str
    recipe: list[Stage]
    recipe_note: str
    measured: list[Measurement]
    parity: str
    results: list[Result]
    results_note: str
    intended_use: list[str]
    out_of_scope: list[str]
    limits: list[str]
    citation: str
    license: str
    tags: list[str]
    model_path: str | None = None


def load_facts(path: str | Path) -> Facts:
    """Read a facts file.

    Raises:
        ValueError: naming the file and the key that is unknown, missing or of the wrong type.
    """
    path = Path(path)
    mapping = yaml.safe_load(path.read_text(encoding="utf-8"))
    facts: Facts = _typed(Facts, mapping, path.name)
    for result in facts.results:
        if result.task_type and not (result.url and result.dataset_id and isinstance(result.value, float)):
            raise ValueError(
                f"{path.name}: the result {result.task!r} has a task_type, so it goes into the model-index: it needs "
                "url (its source), dataset_id and a number as value."
            )
    return facts


def _typed(kind: Any, value: Any, where: str) -> Any:
    """Return a value as a type of the dataclasses above, or raise ValueError naming where it stands."""
    if is_dataclass(kind):
        return _dataclass(kind, value, where)
    if get_origin(kind) is list:
        if not isinstance(value, list):
            raise ValueError(f"{where}: a list is wanted, got {type(value).__name__}.")
        return [_typed(get_args(kind)[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    options = get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if type(value) in options:
        return value.strip() if isinstance(value, str) else value
    if type(value) is int and float in options:
        return float(value)
    names = " or ".join("nothing" if option is types.NoneType else option.__name__ for option in options)
    raise ValueError(f"{where}: {names} is wanted, got {value!r} ({type(value).__name__}).")


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: keys are wanted, got {type(value).__name__}.")
    names = [field.name for field in fields(kind)]
    for key in value:
        if key not in names:
            close = difflib.get_close_matches(str(key), names, n=1)
            raise ValueError(f"{where}: unknown key {key!r}." + (f" Did you mean {close[0]!r}?" if close else ""))
    missing = [field.name for field in fields(kind) if field.default is MISSING and field.name not in value]
    if missing:
        raise ValueError(f"{where}: missing key {', '.join(map(repr, missing))}.")
    hints = get_type_hints(kind)
    return kind(**{key: _typed(hints[key], item, f"{where}: {key}") for key, item in value.items()})


def render_card(facts: str | Path, *, repo_id: str = ORIGINAL_REPO, subfolder: str = "") -> str:
    """Return a model card's text, metadata included.

    Args:
        facts: path of the facts file.
        repo_id: Hub repository that the card is for, which its examples name.
        subfolder: folder of this size in the repository; "" for its root.

    Raises:
        ValueError: for facts, names or metadata that can't be used.
    """
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
        original_repo=ORIGINAL_REPO,
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
    """Return the metadata of the card: what the Hub filters by."""
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
        # Somebody's copy of the released weights says where they come from; the originals come from nothing.
        base_model=ORIGINAL_REPO if facts.released and repo_id != ORIGINAL_REPO else None,
        eval_results=results or None,
        model_name=facts.title if results else None,
    )


def check_card(text: str) -> ModelCard:
    """Parse a card as huggingface_hub does, and check what can be checked offline.

    Whether the Hub knows the license, the tags' meaning, and the data sets, only `ModelCard.validate` can tell.

    Raises:
        ValueError: naming what is wrong.
    """
    card = ModelCard(text)
    data = card.data
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
    """Return a page that shows the card about as the Hub does: the metadata as chips, then the text."""
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


def main(
    facts: Annotated[Path, typer.Argument(help="Facts file of the size, for instance model_cards/70m.yaml.")],
    output: Annotated[Path | None, typer.Argument(help="File to write.", show_default="standard output")] = None,
    repo_id: Annotated[str, typer.Option(help="Hub repository that the card is for.")] = ORIGINAL_REPO,
    subfolder: Annotated[str, typer.Option(help="Folder of this size in the repository.")] = "",
    html_file: Annotated[Path | None, typer.Option("--html", help="Also write the card as a page to look at.")] = None,
) -> None:
    """Render a model card."""
    try:
        text = render_card(facts, repo_id=repo_id, subfolder=subfolder)
    except (OSError, ValueError, yaml.YAMLError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None
    if html_file is not None:
        html_file.write_text(to_html(text), encoding="utf-8")
    if output is None:
        typer.echo(text, nl=False)
    else:
        output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
