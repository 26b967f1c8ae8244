"""Render a model card from a facts file as Markdown for the Hub and as HTML to look at.

    python model_cards/render.py FACTS.yaml [OUTPUT] [--repo-id ID] [--subfolder NAME] [--html FILE]

The facts of the released sizes, the template and the rendering are part of the package (`tahoex1_hf/hub/cards/`);
the facts files here are links to them.
"""

from pathlib import Path
from typing import Annotated

import typer
import yaml

from tahoex1_hf.hub.cards.rendering import ORIGINAL_REPO, render_card, to_html


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
        if html_file is not None:
            html_file.write_text(to_html(text), encoding="utf-8")
        if output is not None:
            output.write_text(text, encoding="utf-8")
    except (OSError, ValueError, yaml.YAMLError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None
    if output is None:
        typer.echo(text, nl=False)


if __name__ == "__main__":
    typer.run(main)
