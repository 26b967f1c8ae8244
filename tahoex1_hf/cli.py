"""The command `tahoex1`."""

import typer

from tahoex1_hf.data_cli import build_vocab, drug_fingerprints_command
from tahoex1_hf.embed_cli import embed
from tahoex1_hf.perturb_cli import perturb
from tahoex1_hf.predict_cli import predict
from tahoex1_hf.prepare_cli import prepare

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


if __name__ == "__main__":
    app()
