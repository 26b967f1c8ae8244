# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `tahoex1`.

A command imports its modules when it runs, so that `--help` and shell completion need not wait for torch.
"""

from typing import Annotated

import typer

from tahoex1_hf import __version__
from tahoex1_hf.cli.annotate import annotate
from tahoex1_hf.cli.convert import convert
from tahoex1_hf.cli.embed import embed
from tahoex1_hf.cli.evaluate import evaluate
from tahoex1_hf.cli.export import export
from tahoex1_hf.cli.finetune import finetune
from tahoex1_hf.cli.impute import impute
from tahoex1_hf.cli.index import index
from tahoex1_hf.cli.perturb import perturb
from tahoex1_hf.cli.predict import predict
from tahoex1_hf.cli.prepare import prepare
from tahoex1_hf.cli.pretrain import pretrain
from tahoex1_hf.cli.recipes import recipes
from tahoex1_hf.cli.report import report
from tahoex1_hf.cli.signatures import signatures
from tahoex1_hf.cli.verify_release import verify_release
from tahoex1_hf.cli.vocabulary import build_vocab, drug_fingerprints

app = typer.Typer(name="tahoex1", no_args_is_help=True, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tahoex1_hf {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Tahoe-x1 single-cell foundation models."""


for name, function in {
    "embed": embed,
    "perturb": perturb,
    "predict": predict,
    "annotate": annotate,
    "impute": impute,
    "report": report,
    "prepare": prepare,
    "pretrain": pretrain,
    "finetune": finetune,
    "evaluate": evaluate,
    "recipes": recipes,
    "convert": convert,
    "export": export,
    "verify-release": verify_release,
    "build-vocab": build_vocab,
    "drug-fingerprints": drug_fingerprints,
}.items():
    app.command(name)(function)

app.add_typer(index, name="index")
app.add_typer(signatures, name="signatures")
