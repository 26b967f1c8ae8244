"""The Auto classes know the model type whatever the order of imports, and nothing is imported early."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from forked import PATIENCE, Forked
from helpers import REPO_ROOT

from tahoex1_hf import TahoeX1Config

DEMO = REPO_ROOT / "examples" / "demo_checkpoint"
LOAD = f"""
import tahoex1_hf, transformers
kinds = {{'AutoConfig': {{}}, 'AutoTokenizer': {{}}, 'AutoModel': {{}}, 'AutoModelForPreTraining': {{}}}}
kinds |= dict.fromkeys(['AutoModelForSequenceClassification', 'AutoModelForTokenClassification'], {{'num_labels': 2}})
for kind, options in kinds.items():
    made = getattr(transformers, kind).from_pretrained({str(DEMO)!r}, **options)
    assert type(made).__module__.startswith('tahoex1_hf.'), (kind, type(made))
"""


FRESH = f"""
import sys, tahoex1_hf
found = {{'torch', 'transformers', 'numpy', 'typer', 'accelerate', 'peft'}} & set(sys.modules)
assert not found, found
import tahoex1_hf.cli.running as running
running.set_up_logging(False, False)
found = {{'torch', 'transformers'}} & set(sys.modules)
assert not found, found
from transformers import BertModel  # its module imports the Auto models while it imports what our models need
import logging
logging.getLogger('torchao').warning('something else')
print('loading', file=sys.stderr)
{LOAD}
print('loaded')
"""


@pytest.fixture(scope="module")
def fresh() -> subprocess.CompletedProcess[str]:
    """Return the end of a process of its own: imported modules stay imported, and messages about it come once."""
    environment = {**os.environ, "PYTHONPATH": str(REPO_ROOT), "HF_HUB_OFFLINE": "1"}
    environment.pop("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", None)
    command = [sys.executable, "-c", FRESH]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)


def test_the_package_imports_nothing_before_its_use_and_is_known_afterwards(
    fresh: subprocess.CompletedProcess[str],
) -> None:
    assert (fresh.returncode, fresh.stdout) == (0, "loaded\n"), fresh.stderr[-3000:]


def test_messages_of_other_libraries_about_themselves_are_hidden(fresh: subprocess.CompletedProcess[str]) -> None:
    pytest.importorskip("torchao")
    assert fresh.stderr.partition("loading\n")[:2] == ("WARNING: something else\n", "loading\n")


def run_without_package(code: str, *arguments: object) -> None:
    """Run code in a fork of a process that has imported transformers, and not the package."""
    first = "import sys; assert 'tahoex1_hf' not in sys.modules\n"
    done = Forked([sys.executable, "-c", first + code, *arguments], package=False).completed()
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_model_type_is_known_where_transformers_was_imported_first() -> None:
    run_without_package("from transformers import AutoModel, AutoTokenizer\n" + LOAD)


def test_a_configuration_from_another_process_finds_its_model(tmp_path: Path) -> None:
    """A worker process that receives a pickled configuration creates none itself."""
    config = TahoeX1Config(vocab_size=8, hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
    (tmp_path / "config").write_bytes(pickle.dumps(config))
    run_without_package(
        "import pickle\n"
        "config = pickle.load(open(sys.argv[1], 'rb'))\n"
        "from transformers import AutoModel\n"
        "assert type(AutoModel.from_config(config)).__name__ == 'TahoeX1Model'\n",
        tmp_path / "config",
    )
