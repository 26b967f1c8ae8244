"""The model loads with `trust_remote_code` where the package is not installed, and the package imports cheaply."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from elsewhere import run_elsewhere
from helpers import GOLDEN, REPO_ROOT, SHAPES, make_batch, tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tahoex1_hf import (
    TahoeX1Config,
    TahoeX1ForPreTraining,
    TahoeX1ForSequenceClassification,
    TahoeX1ForTokenClassification,
    TahoeX1Model,
)
from tahoex1_hf.configuration_tahoe_x1 import AUTO_MAP, CODE_FILES
from tahoex1_hf.original.convert import convert_original_folder

AUTO_CLASSES = {
    "AutoModel": TahoeX1Model,
    "AutoModelForPreTraining": TahoeX1ForPreTraining,
    "AutoModelForSequenceClassification": TahoeX1ForSequenceClassification,
    "AutoModelForTokenClassification": TahoeX1ForTokenClassification,
}


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the classes, so that they copy their files when they are saved into a folder for the Hub."""
    for auto_class, model_class in (("AutoConfig", TahoeX1Config), *AUTO_CLASSES.items()):
        monkeypatch.setattr(model_class, "_auto_class", None, raising=False)
        model_class.register_for_auto_class(auto_class)


def save_for_the_hub(model: torch.nn.Module, folder: Path) -> None:
    model.config.auto_map = dict(AUTO_MAP)
    model.save_pretrained(folder)


@pytest.mark.usefixtures("registered")
def test_models_load_without_the_package(tmp_path: Path) -> None:
    config = tiny_config(**SHAPES["drugs_observed_or_self_mean"])
    model, batch = tiny_model(config), make_batch(config)
    save_for_the_hub(model, tmp_path / "repo")
    assert {path.name for path in (tmp_path / "repo").glob("*.py")} == set(CODE_FILES)
    assert json.loads((tmp_path / "repo" / "config.json").read_text())["auto_map"] == AUTO_MAP
    save_file(batch, tmp_path / "batch.safetensors")
    run_elsewhere(
        """
        import torch, transformers
        from safetensors.torch import load_file, save_file
        torch.set_num_threads(1)
        batch = load_file("batch.safetensors")
        labels = batch.pop("labels")
        results = {}
        for auto_class in (
            "AutoModel",
            "AutoModelForPreTraining",
            "AutoModelForSequenceClassification",
            "AutoModelForTokenClassification",
        ):
            cls = getattr(transformers, auto_class)
            model = cls.from_pretrained("repo", trust_remote_code=True).eval()
            assert type(model).__module__.startswith("transformers_modules."), type(model)
            assert type(model.config).__module__.startswith("transformers_modules."), type(model.config)
            more = {"labels": labels} if auto_class == "AutoModelForPreTraining" else {}
            with torch.no_grad():
                outputs = model(**batch, **more)
            for name in ("pooler_output", "loss", "expression_predictions", "cell_expression_predictions"):
                if outputs.get(name) is not None:
                    results[auto_class + "." + name] = outputs[name].contiguous()
        save_file(results, "results.safetensors")
        """,
        tmp_path,
        as_process=True,
    )
    results = load_file(tmp_path / "results.safetensors")
    with torch.no_grad():
        expected = model(**batch)
    assert len(results) == 5
    assert torch.equal(results["AutoModel.pooler_output"], expected.pooler_output)
    for name in ("pooler_output", "loss", "expression_predictions", "cell_expression_predictions"):
        assert torch.equal(results[f"AutoModelForPreTraining.{name}"], expected[name]), name


@pytest.mark.usefixtures("registered")
def test_tokenizer_loads_without_the_package(tmp_path: Path) -> None:
    convert_original_folder(GOLDEN / "b_3b_like_chem" / "model", tmp_path / "converted")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "converted")
    previous = type(tokenizer)._auto_class
    type(tokenizer).register_for_auto_class("AutoTokenizer")
    try:
        tokenizer.save_pretrained(tmp_path / "repo")
    finally:
        type(tokenizer)._auto_class = previous
    assert "auto_map" in json.loads((tmp_path / "repo" / "tokenizer_config.json").read_text())
    run = run_elsewhere(
        """
        import json
        from transformers import AutoTokenizer
        tokenizer = AutoTokenizer.from_pretrained("repo", trust_remote_code=True)
        assert type(tokenizer).__module__.startswith("transformers_modules."), type(tokenizer)
        print(json.dumps([tokenizer.get_vocab(), tokenizer.drug_to_id, tokenizer.pad_token_id]))
        """,
        tmp_path,
    )
    vocab, drugs, pad = json.loads(run.stdout.splitlines()[-1])
    assert (vocab, drugs, pad) == (tokenizer.get_vocab(), tokenizer.drug_to_id, tokenizer.pad_token_id)


def test_without_trust_nothing_is_run(tmp_path: Path, registered: None) -> None:
    save_for_the_hub(tiny_model(tiny_config()), tmp_path / "repo")
    run_elsewhere(
        """
        from transformers import AutoModel
        try:
            AutoModel.from_pretrained("repo", trust_remote_code=False)
        except ValueError as error:
            assert "trust_remote_code" in str(error), error
        else:
            raise SystemExit("loaded without being trusted")
        """,
        tmp_path,
    )


def test_remote_files_import_only_each_other_and_the_core() -> None:
    files = sorted((REPO_ROOT / "tahoex1_hf").glob("*_tahoe_x1.py"))
    assert len(files) >= 3
    for path in files:
        source = path.read_text()
        assert "import tahoex1_hf" not in source, path
        assert "from tahoex1_hf" not in source, path


def test_importing_the_package_is_cheap() -> None:
    script = """
        import json, sys
        from transformers import AutoConfig, AutoTokenizer, BertModel, PreTrainedTokenizer
        before = {name.split(".")[0] for name in sys.modules}
        import tahoex1_hf
        after = {name.split(".")[0] for name in sys.modules}
        print(json.dumps([sorted(before), sorted(after)]))
    """
    environment = os.environ | {"PYTHONPATH": str(REPO_ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    before, after = json.loads(run.stdout.splitlines()[-1])
    added = {name for name in set(after) - set(before) if name not in sys.stdlib_module_names}
    assert added == {"tahoex1_hf"}
