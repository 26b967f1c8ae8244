"""Pretrain a Tahoe-x1 model: on a laptop's CPU, one GPU, or FSDP over many nodes.

    accelerate launch examples/pretrain.py examples/configs/pretrain/debug.yaml dataset=DIR output_dir=DIR

Any key of the recipe can be given as `key=value` behind it. The same command on the same `output_dir` goes on where
the run was; in the end `output_dir` loads with `AutoModelForPreTraining` and `AutoTokenizer`. How many devices share
the work, and how, is the launcher's affair: `accelerate launch --config_file examples/configs/accelerate/fsdp2.yaml`.
"""

import logging
import sys
from typing import Annotated

import typer

from tahoex1_hf.training.config import read_pretrain_config
from tahoex1_hf.training.pretraining import pretrain


def main(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE.yaml", help="See examples/configs/pretrain.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE...")] = None,
) -> None:
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    try:
        config = read_pretrain_config(recipe, overrides or [])
    except (ValueError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None
    raise typer.Exit(pretrain(config))


if __name__ == "__main__":
    typer.run(main)
