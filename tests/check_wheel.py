"""Build the wheel, install it by itself into an empty folder, and use it from there.

Run by ``make test``. It finds what an editable install hides: a module or py.typed that is not packaged, an
import of a file that only the repository has, an optional dependency imported by ``import tahoex1_hf``.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOT_SOURCE = (
    ".*",
    "build",
    "dist",
    "*.egg-info",
    "__pycache__",
    "demo_output",
    "outputs",
    "runs",
    "wandb",
    "venv",
)

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
"""


def run_python(what: str, *arguments: str | Path, **options) -> str:
    """Run this Python, say what it was for, and end the check with its output where it fails."""
    command = [sys.executable, *arguments]
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options
    )
    if result.returncode:
        sys.exit(f"{result.stdout}\nwheel check FAILED: {what} (exit status {result.returncode})")
    print(f"wheel check: {what}: ok", flush=True)
    return result.stdout


def check_contents(wheel: Path) -> None:
    """Only the package may be in the wheel, and all of it."""
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = ROOT / "tahoex1_hf"
    expected = {f"tahoex1_hf/{path.relative_to(package).as_posix()}" for path in package.rglob("*.py")}
    expected |= {"tahoex1_hf/py.typed", "tahoex1_hf/hub/LICENSE"}
    cards = package / "hub" / "cards"
    expected |= {f"tahoex1_hf/hub/cards/{path.name}" for path in cards.iterdir() if path.is_file()}
    if files != expected:
        sys.exit(
            f"wheel check FAILED: contents of {wheel.name}: "
            f"missing {sorted(expected - files)}, not expected {sorted(files - expected)}"
        )
    print(f"wheel check: {wheel.name} holds the package and nothing else: ok", flush=True)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="tahoex1_wheel_") as temporary:
        tmp = Path(temporary)
        source, dist, target, elsewhere = (tmp / name for name in ("source", "dist", "target", "elsewhere"))
        elsewhere.mkdir()
        # From a copy, since setuptools also packs what an earlier build left in build/.
        shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*NOT_SOURCE))
        run_python("builds", "-m", "build", "--wheel", "--no-isolation", "--outdir", dist, source)
        (wheel,) = dist.glob("*.whl")
        check_contents(wheel)
        install = ["-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", target, wheel]
        run_python("installs", *install)
        # PYTHONPATH comes before the editable install of the environment that runs this.
        away = {"cwd": elsewhere, "env": {**os.environ, "PYTHONPATH": str(target), "HF_HUB_OFFLINE": "1"}}
        run_python("is imported and known to transformers", "-c", USE_IT, target, **away)
        help_text = run_python("tahoex1 --help", "-m", "tahoex1_hf", "--help", **away)
        if "usage" not in help_text.lower():
            sys.exit(f"{help_text}\nwheel check FAILED: python -m tahoex1_hf --help printed no usage")


if __name__ == "__main__":
    main()
