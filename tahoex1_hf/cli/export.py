# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `tahoex1 export`."""

from pathlib import Path
from typing import Annotated

import typer

from tahoex1_hf.cli import options
from tahoex1_hf.cli.running import command, quick_imports


@command(extra="cards", errors=(RuntimeError,))
def export(
    converted: Annotated[
        list[str], typer.Argument(metavar="CONVERTED...", help="Converted folders, or NAME=FOLDER to name the size.")
    ],
    repo_dir: Annotated[
        Path, typer.Argument(metavar="REPO_DIR", help="Folder to build; an earlier export there is replaced.")
    ],
    default: Annotated[str | None, typer.Option(help="Size at the root.", show_default="the first one")] = None,
    card: Annotated[
        Path | None,
        typer.Option(
            help="Facts (.yaml) or a ready README (.md) of the size at the root.",
            show_default="that of the released size",
        ),
    ] = None,
    push: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="Upload to this repository.")] = None,
    private: options.Private = False,
    revision: Annotated[str | None, typer.Option(help="Branch to upload to.", show_default="main")] = None,
    commit_message: Annotated[str, typer.Option(help="Message of the commit.")] = "Tahoe-x1 for transformers",
) -> str:
    """Build a Hub repository from converted checkpoints, prove that it loads without this package, and upload it.

    Without --push, the files that would be uploaded are listed and nothing leaves the machine.
    """
    with quick_imports():
        from tahoex1_hf.hub.export import export_repository, push_repository

    exported = export_repository(converted, repo_dir, default=default, card=card, repo_id=push)
    for name, difference in exported.differences.items():
        typer.echo(f"{name}: loads without the package; largest difference from its outputs {difference:.1g}")
    if not exported.has_card:
        typer.echo("There is no README.md: --push will ask for one (--card).")
    sizes = {path: path.stat().st_size for path in exported.files}
    for path, size in sizes.items():
        typer.echo(f"{size:>15,}  {path.relative_to(repo_dir)}")
    typer.echo(f"{sum(sizes.values()):>15,}  bytes in {len(sizes)} files")
    if push is None:
        return f"Nothing was uploaded. To upload: the same command with --push OWNER/NAME ({repo_dir})"
    address = push_repository(repo_dir, push, private=private, revision=revision, commit_message=commit_message)
    return f"Uploaded: {address}"
