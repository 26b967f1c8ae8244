"""Build the folder of a Hub repository from converted checkpoints, prove that it loads, and upload it.

    python conversion/export_to_hub.py CONVERTED... REPO_DIR [--default 70m] [--push OWNER/NAME]

CONVERTED are folders written by convert_checkpoint.py; each size is named after its folder, or as in 70m=FOLDER.
Before anything is uploaded, the result is loaded in a process without this package, through every Auto class, and its
embeddings are compared with the package's. Without --push, what would go is printed and nothing leaves the machine.
"""

import logging
from pathlib import Path
from typing import Annotated

import typer

from tahoex1_hf.hub.export import export_repository, push_repository


def main(
    converted: Annotated[list[str], typer.Argument(help="Converted folders, or NAME=FOLDER.")],
    repo_dir: Annotated[Path, typer.Argument(help="Folder to build; an earlier export there is replaced.")],
    default: Annotated[str | None, typer.Option(help="Size at the root.", show_default="the first one")] = None,
    card: Annotated[
        Path | None,
        typer.Option(
            help="Facts (.yaml) or a ready README (.md) of the size at the root.",
            show_default="that of the released size",
        ),
    ] = None,
    push: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="Upload to this repository.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Create the repository as a private one.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to upload to.", show_default="main")] = None,
    commit_message: Annotated[str, typer.Option(help="Message of the commit.")] = "Tahoe-x1 for transformers",
) -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    try:
        exported = export_repository(converted, repo_dir, default=default, card=card, repo_id=push)
        for name, difference in exported.differences.items():
            typer.echo(f"{name}: loads without the package; largest difference to it {difference:.1g}")
        if not exported.has_card:
            typer.echo("There is no README.md: --push will ask for one (--card).")
        sizes = {path: path.stat().st_size for path in exported.files}
        for path, size in sizes.items():
            typer.echo(f"{size:>15,}  {path.relative_to(repo_dir)}")
        typer.echo(f"{sum(sizes.values()):>15,}  bytes in {len(sizes)} files")
        if push is None:
            typer.echo(f"Nothing was uploaded. To upload: the same command with --push OWNER/NAME ({repo_dir})")
            return
        address = push_repository(repo_dir, push, private=private, revision=revision, commit_message=commit_message)
    except (OSError, ValueError, RuntimeError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"Uploaded: {address}")


if __name__ == "__main__":
    typer.run(main)
