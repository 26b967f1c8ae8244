"""Build the folder of a Hub repository from converted checkpoints, prove that it loads, and upload it.

    python conversion/export_to_hub.py CONVERTED... REPO_DIR [--default 70m] [--push OWNER/NAME]

CONVERTED are folders written by convert_checkpoint.py; each size is named after its folder, or as in 70m=FOLDER.
Before anything is uploaded, the result is loaded in a process without this package, through every Auto class, and its
embeddings are compared with the package's. Without --push, what would go is printed and nothing leaves the machine.
"""

import importlib.util
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from tahoex1_hf.hub.export import build_repository, size_names

ROOT = Path(__file__).resolve().parents[1]
CARDS = ROOT / "model_cards"


def main(
    converted: Annotated[list[str], typer.Argument(help="Converted folders, or NAME=FOLDER.")],
    repo_dir: Annotated[Path, typer.Argument(help="Folder to build; an earlier export there is replaced.")],
    default: Annotated[str | None, typer.Option(help="Size at the root.", show_default="the first one")] = None,
    card: Annotated[
        Path | None,
        typer.Option(
            help="Facts (.yaml) or a ready README (.md).", show_default="model_cards/SIZE.yaml of the default"
        ),
    ] = None,
    push: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="Upload to this repository.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Create the repository as a private one.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to upload to.", show_default="main")] = None,
    commit_message: Annotated[str, typer.Option(help="Message of the commit.")] = "Tahoe-x1 for transformers",
) -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    try:
        sizes = size_names(converted)
        default = default or next(iter(sizes))
        cards = {name: find_card(name, folder, default, card, push) for name, folder in sizes.items()}
        if cards.get(default) is None and push:
            raise ValueError("there is no model card to upload: pass --card FACTS.yaml or --card README.md.")
        differences = build_repository(
            sizes,
            repo_dir,
            default=default,
            license_file=ROOT / "LICENSE",
            cards={name: text for name, text in cards.items() if text is not None},
        )
        for name, difference in differences.items():
            typer.echo(f"{name}: loads without the package; largest difference to it {difference:.1g}")
        if cards[default] is None:
            typer.echo("There is no README.md: --push will ask for one (--card).")
        list_files(repo_dir)
        if push is None:
            typer.echo(f"Nothing was uploaded. To upload: the same command with --push OWNER/NAME ({repo_dir})")
        else:
            upload(repo_dir, push, private, revision, commit_message)
    except HfHubHTTPError as error:
        typer.echo(
            f"Error: the upload to {push} stopped: {error}\nWhat arrived is kept: run the same command again to go "
            "on, after logging in (hf auth login) if that is what is missing.",
            err=True,
        )
        raise typer.Exit(1) from None
    except (OSError, ValueError, RuntimeError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None


def find_card(size: str, folder: Path, default: str, card: Path | None, repo_id: str | None) -> str | None:
    """The text of a size's README.md: --card, or from the facts of a released size, or what lies in the folder."""
    card = card if size == default else None
    if card is None:
        facts = [CARDS / f"{name}.yaml" for name in (size, size.replace(".", "_"), {"1b": "1_3b"}.get(size, size))]
        card = next((path for path in facts if path.is_file()), None)
    if card is None:
        ready = folder / "README.md"
        return ready.read_text(encoding="utf-8") if ready.is_file() else None
    if not card.is_file():
        raise FileNotFoundError(f"--card {card} is not a file.")
    if card.suffix not in (".yaml", ".yml"):
        return card.read_text(encoding="utf-8")
    return render_card(card, "" if size == default else size, repo_id)


def render_card(facts: Path, subfolder: str, repo_id: str | None) -> str:
    script = CARDS / "render.py"
    spec = importlib.util.spec_from_file_location("model_card_render", script)
    if spec is None or spec.loader is None or not script.is_file():
        raise FileNotFoundError(f"{script} is missing: pass a ready README.md as --card.")
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module.render_card(facts, subfolder=subfolder, **({"repo_id": repo_id} if repo_id else {}))


def list_files(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        typer.echo(f"{path.stat().st_size:>15,}  {path.relative_to(folder)}")
    typer.echo(f"{sum(path.stat().st_size for path in files):>15,}  bytes in {len(files)} files")


def upload(folder: Path, repo_id: str, private: bool, revision: str | None, commit_message: str) -> None:
    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    # Run again after an interruption, it skips what is there already.
    commit = api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message)
    typer.echo(f"Uploaded: {commit.commit_url}")


if __name__ == "__main__":
    typer.run(main)
