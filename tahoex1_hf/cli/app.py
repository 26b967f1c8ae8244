"""The command `tahoex1`."""

import typer

from tahoex1_hf.cli.embed import embed
from tahoex1_hf.cli.perturb import perturb
from tahoex1_hf.cli.predict import predict
from tahoex1_hf.cli.prepare import prepare
from tahoex1_hf.cli.vocabulary import build_vocab, drug_fingerprints_command

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Tahoe-x1 single-cell foundation models."""


app.command()(embed)
app.command()(perturb)
app.command()(predict)
app.command()(prepare)
app.command("build-vocab")(build_vocab)
app.command("drug-fingerprints")(drug_fingerprints_command)
