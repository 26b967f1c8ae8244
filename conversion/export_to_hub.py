"""Build a Hub repository from converted checkpoints: the command `tahoex1 export` as a script.

python conversion/export_to_hub.py CONVERTED... REPO_DIR [--default 70m] [--push OWNER/NAME]
"""

import typer

from tahoex1_hf.cli.export import export

if __name__ == "__main__":
    typer.run(export)
