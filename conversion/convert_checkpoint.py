"""Convert a checkpoint of the original program into a folder that AutoModel and AutoTokenizer load.

    python conversion/convert_checkpoint.py SRC DST

SRC holds model_config.yml, collator_config.yml, vocab.json and model.safetensors (or best-model.pt); with a drug
encoder, drug_to_id_pad.json too.
"""

import logging
from pathlib import Path

import typer

from tahoex1_hf import TahoeX1ForPreTraining
from tahoex1_hf.original_checkpoints import convert_original_folder


def main(source: Path, destination: Path) -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    try:
        convert_original_folder(source, destination)
    except (OSError, ValueError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None
    # Load what was written, as a user will: from_pretrained only warns of a tensor that does not fit.
    model, report = TahoeX1ForPreTraining.from_pretrained(destination, output_loading_info=True)
    problems = {kind: names for kind, names in report.items() if names}
    if problems:
        typer.echo(f"Error: {destination} does not load cleanly: {problems}", err=True)
        raise typer.Exit(1)
    typer.echo(f"{destination}: {model.num_parameters():,} parameters, {model.dtype}")


if __name__ == "__main__":
    typer.run(main)
