"""Pretrain a Tahoe-x1 model: on a laptop's CPU, one GPU, or FSDP over many nodes.

    accelerate launch examples/pretrain.py examples/configs/pretrain/debug.yaml dataset=DIR output_dir=DIR

Any key of the recipe can be given as `key=value` behind it. The same command on the same `output_dir` goes on where
the run was; in the end `output_dir` loads with `AutoModelForPreTraining` and `AutoTokenizer`. How many devices share
the work, and how, is the launcher's affair: `accelerate launch --config_file examples/configs/accelerate/fsdp2.yaml`.
"""

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer
from accelerate import PartialState

from tahoex1_hf.hub.export import export_repository, push_repository
from tahoex1_hf.training.config import read_pretrain_config
from tahoex1_hf.training.pretraining import pretrain


def main(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE.yaml", help="See examples/configs/pretrain.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE...")] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="In the end, upload the model, with a card.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create that repository as a private one.")] = False,
) -> None:
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    try:
        config = read_pretrain_config(recipe, overrides or [])
    except (ValueError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None
    code = pretrain(config)
    if push_to_hub is not None and code == 0 and PartialState().is_main_process:
        upload(Path(config.output_dir), push_to_hub, private)
    raise typer.Exit(code)


def upload(folder: Path, repository: str, private: bool) -> None:
    """Build the repository beside the model, see that it loads without this package, and upload it."""
    name = repository.rpartition("/")[2]
    exported = export_repository([f"{name}={folder}"], folder / "hub", card=folder / "card.yaml", repo_id=repository)
    logging.info("Uploaded: %s", push_repository(exported.folder, repository, private=private))


if __name__ == "__main__":
    typer.run(main)
