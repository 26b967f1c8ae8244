"""Build the wheel, install it by itself into an empty folder, and use it from there.

Run by ``make test``. It finds what an editable install hides: a module, a recipe or py.typed that is not packaged, an
import of a file that only the repository has, an optional dependency imported by ``import tahoex1_hf``. The last check
pretrains a small model from the empty folder and uploads it to a stand-in for the Hub.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).with_name("support")))
from cells import make_cells, write_cells, write_vocab
from hub_server import Hub, serve

ROOT = Path(__file__).resolve().parents[1]
# Names beside the source in the root folder: hidden files, and what was built or made there.
NOT_SOURCE = {"build", "dist", "demo_output", "outputs", "runs", "wandb", "venv"}

# Run with the folder that the wheel was installed into as its argument.
USE_IT = """
import importlib.metadata
import sys
from pathlib import Path

import tahoex1_hf
from tahoex1_hf import TahoeX1Config, TahoeX1Model, TahoeX1Tokenizer

target = Path(sys.argv[1]).resolve()
where = Path(tahoex1_hf.__file__).resolve()
assert where.is_relative_to(target), f"imported {where}, which is not the installed wheel"

from transformers import AutoConfig

config = AutoConfig.for_model("tahoe_x1")
assert type(config) is TahoeX1Config, f"AutoConfig makes a {type(config)} for tahoe_x1"

optional = {"anndata", "datasets", "peft", "scanpy"} & set(sys.modules)
assert not optional, f"import tahoex1_hf also imported the optional {sorted(optional)}"

installed = importlib.metadata.distribution("tahoex1_hf")
assert installed.version == tahoex1_hf.__version__, f"{installed.version} is not {tahoex1_hf.__version__}"

from tahoex1_hf.cli.app import app

(script,) = installed.entry_points.select(group="console_scripts", name="tahoex1")
assert script.load() is app, "the console script tahoex1 is not tahoex1_hf.cli.app:app"

app(["prepare", "--config", "set.yaml"])
"""


def run_python(what: str, *arguments: str | Path, **options) -> str:
    """Run this Python and print `what` it checks; end the wheel check with its output where it fails."""
    command = [sys.executable, *arguments]
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options
    )
    if result.returncode:
        sys.exit(f"{result.stdout}\nwheel check FAILED: {what} (exit status {result.returncode})")
    print(f"wheel check: {what}: ok", flush=True)
    return result.stdout


def check(condition: bool, what: str, output: object) -> None:
    """End the check and print `output` where the condition on it does not hold."""
    if not condition:
        sys.exit(f"{output}\nwheel check FAILED: {what}")


def not_source(folder: str, names: list[str]) -> set[str]:
    """Tell shutil.copytree what to leave out; a folder of the package may be called `runs`."""
    left_out = {name for name in names if name == "__pycache__" or name.endswith(".egg-info")}
    if Path(folder) == ROOT:
        left_out |= {name for name in names if name in NOT_SOURCE or name.startswith(".")}
    return left_out


def check_contents(wheel: Path) -> None:
    """Check that the wheel holds the whole package and nothing else: modules, recipes, cards, a license."""
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = ROOT / "tahoex1_hf"
    paths = [path.relative_to(ROOT) for path in package.rglob("*") if path.is_file()]
    expected = {path.as_posix() for path in paths if "__pycache__" not in path.parts}
    difference = f"missing {sorted(expected - files)}, not expected {sorted(files - expected)}"
    check(files == expected, f"contents of {wheel.name}", difference)
    recipes = [name for name in files if "/recipes/" in name]
    check(len(recipes) >= 17, f"{wheel.name} holds the recipes", recipes)
    print(f"wheel check: {wheel.name} holds the package and nothing else: ok", flush=True)


def take_over_compiled(target: Path) -> None:
    """Copy the loops that numba has compiled in the clone, if any: at a new place it would compile for 4 CPU seconds.

    numba takes them for those of files that are as old and as large as the ones that it compiled.
    """
    for there in (ROOT / "tahoex1_hf").rglob("*.nb[ci]"):
        here = target / there.relative_to(ROOT)
        here.parent.mkdir(exist_ok=True)
        shutil.copy2(there, here)
        module = there.name.partition(".")[0] + ".py"
        shutil.copystat(there.parents[1] / module, here.parents[1] / module)


def check_command(target: Path, away: dict[str, Any]) -> None:
    """Check the command as it was installed, and as a module."""
    version = run_python("the script tahoex1", target / "bin" / "tahoex1", "--version", **away)
    check(version.startswith("tahoex1_hf "), "tahoex1 --version", version)
    for module in ("tahoex1_hf", "tahoex1_hf.cli"):
        text = run_python(f"python -m {module} --help", "-m", module, "--help", **away)
        check("Usage: tahoex1 " in text, f"python -m {module} --help", text)
    names = run_python("tahoex1 recipes", "-m", "tahoex1_hf", "recipes", **away)
    wanted = ("pretrain  70m ", "finetune  classification ", "prepare   tahoe_100m ")
    check(all(name in names for name in wanted), "tahoex1 recipes lists recipes of three commands", names)
    recipe = run_python("tahoex1 recipes 70m", "-m", "tahoex1_hf", "recipes", "70m", **away)
    check(recipe == (ROOT / "tahoex1_hf/training/recipes/70m.yaml").read_text(), "tahoex1 recipes 70m", recipe)
    words = {"_TAHOEX1_COMPLETE": "complete_bash", "COMP_WORDS": "tahoex1 pre", "COMP_CWORD": "1"}
    completing = {**away, "env": {**away["env"], **words}}
    completed = run_python("shell completion", "-m", "tahoex1_hf", **completing)
    check(set(completed.split()) == {"predict", "prepare", "pretrain"}, "shell completion", completed)


def check_package(target: Path, away: dict[str, Any]) -> None:
    """Check what the package imports and what knows it, and prepare cells in the same process."""
    folder = Path(away["cwd"])
    vocab = write_vocab(folder)
    write_cells(make_cells(100), folder / "cells", "csr")
    # Sixty genes: fewer than the usual minimum of a cell.
    (folder / "set.yaml").write_text(
        f"output: set\nvocab: {vocab}\nvalidation: {{fraction: 0.2}}\n"
        "sources: [{kind: anndata, paths: [cells.h5ad], min_known_genes: 0}]\n"
    )
    run_python("is imported, known to transformers, and prepares cells", "-c", USE_IT, target, **away)
    check((folder / "set" / "manifest.json").is_file(), "tahoex1 prepare", "set/manifest.json is not there")


def check_pretraining(away: dict[str, Any]) -> None:
    """Pretrain under Accelerate's launcher and push the model, with nothing of the clone."""
    folder, hub = Path(away["cwd"]), Hub()
    small = ["model.hidden_size=32", "model.num_hidden_layers=1", "model.num_attention_heads=4", "context_length=32"]
    run = ["dataset=set", "output_dir=mine", "global_batch_size=8", "microbatch_size=4", "max_steps=2", *small]
    with serve(hub):
        online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_test"}
        online["HF_HOME"] = str(folder / "hf_home")
        launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "1", "-m", "tahoex1_hf"]
        output = run_python(
            "accelerate launch -m tahoex1_hf pretrain --push-to-hub",
            *launch, "pretrain", "debug", *run, "--push-to-hub", "someone/mine",
            **{**away, "env": {**away["env"], **online}},
        )  # fmt: skip
    uploaded = hub.repos.get("someone/mine", {})
    wanted = {"README.md", "LICENSE", "config.json", "model.safetensors", "modeling_tahoe_x1.py"}
    check(wanted <= uploaded.keys(), "the model is uploaded with its code and a card", f"{output}\n{[*uploaded]}")


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="tahoex1_wheel_") as temporary:
        tmp = Path(temporary)
        source, dist, target, elsewhere = (tmp / name for name in ("source", "dist", "target", "elsewhere"))
        elsewhere.mkdir()
        # From a copy, since setuptools also packs what an earlier build left in build/.
        shutil.copytree(ROOT, source, ignore=not_source)
        run_python("builds", "-m", "build", "--wheel", "--no-isolation", "--outdir", dist, source)
        (wheel,) = dist.glob("*.whl")
        check_contents(wheel)
        install = ["-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", target, wheel]
        run_python("installs", *install)
        take_over_compiled(target)
        # PYTHONPATH comes before the editable install of the environment that runs this.
        away = {"cwd": elsewhere, "env": {**os.environ, "PYTHONPATH": str(target), "HF_HUB_OFFLINE": "1"}}
        check_package(target, away)
        check_command(target, away)
        check_pretraining(away)


if __name__ == "__main__":
    main()
