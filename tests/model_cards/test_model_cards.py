"""Model cards have strict facts, valid metadata, and examples that run."""

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
import typer
import yaml
from conftest import GOLDEN, REPO_ROOT
from typer.testing import CliRunner

from tahoex1_hf import TahoeX1Config, TahoeX1ForPreTraining
from tahoex1_hf.hub.cards.facts import load_facts
from tahoex1_hf.hub.cards.rendering import check_card, render_card
from tahoex1_hf.original.convert import convert_original_folder

anndata = pytest.importorskip("anndata")
jinja2 = pytest.importorskip("jinja2")

CARDS = REPO_ROOT / "model_cards"
DEMO = REPO_ROOT / "examples" / "demo_checkpoint"
RELEASED = {"70m": 70_996_993, "1_3b": 1_353_854_977, "3b": 2_717_041_665}
NAMES = [*RELEASED, "demo"]
SECTIONS = [
    "Quick start",
    "What the input must be",
    "Drug token",
    "Memory and speed",
    "Training",
    "Results",
    "Intended use",
    "Limits, leakage and fairness",
    "Differences from the original",
    "Fine-tuning",
    "How to cite",
]


def facts_with(folder: Path, name: str = "70m", **changes: Any) -> Path:
    """Write a size's facts with some keys changed (None: left out)."""
    facts = yaml.safe_load((CARDS / f"{name}.yaml").read_text(encoding="utf-8")) | changes
    path = folder / "facts.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in facts.items() if value is not None}))
    return path


def python_blocks(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_follow_from_the_shape(name: str) -> None:
    facts = load_facts(CARDS / f"{name}.yaml")
    with torch.device("meta"):
        model = TahoeX1ForPreTraining(TahoeX1Config(**vars(facts.shape)))
    assert facts.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert facts.parameters == RELEASED.get(name, facts.parameters)
    assert facts.size == name.replace("_", ".")


def test_demo_facts_agree_with_the_checkpoint() -> None:
    facts = load_facts(CARDS / "demo.yaml")
    config = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
    assert {key: config[key] for key in vars(facts.shape)} == vars(facts.shape)
    log = json.loads((DEMO / "training_log.json").read_text(encoding="utf-8"))
    assert facts.data[0].cells == f"{log['training_cells']} to train on, {log['held_out_cells']} held out"
    assert f"{log['steps']:,} steps in {log['seconds']} s" in facts.recipe_note
    assert facts.recipe[0].epochs == log["history"][-1]["epoch"]
    losses = [result.value for result in facts.results if result.source == "training_log.json"]
    assert losses == [f"{loss:.3f}" for loss in (*log["final"].values(), *log["baselines"].values())]


def test_work_per_cell_equals_the_benchmarks_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPO_ROOT))
    from tahoex1_hf.training.flops import embedding_flops

    for name in NAMES:
        shape = load_facts(CARDS / f"{name}.yaml").shape
        assert shape.embedding_flops(1000) == embedding_flops(TahoeX1Config(**vars(shape)), np.array([1000]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"paramters": 3}, r"facts.yaml: unknown key 'paramters'. Did you mean 'parameters'\?"),
        ({"limits": None, "license": None}, "facts.yaml: missing key 'limits', 'license'"),
        ({"parameters": "71 million"}, r"facts.yaml: parameters: int is wanted, got '71 million' \(str\)"),
        ({"parameters": True}, "int is wanted, got True"),
        ({"limits": "none"}, "facts.yaml: limits: a list is wanted, got str"),
        ({"limits": ["one", 2]}, r"limits\[1\]: str is wanted, got 2"),
        ({"shape": {"hidden_size": 512}}, "facts.yaml: shape: missing key 'vocab_size'"),
        (
            {"data": [{"name": "x", "cells": "1", "description": "y", "hub_id": 7}]},
            r"data\[0\]: hub_id: str or nothing",
        ),
        ({"data": [{"name": "x", "cells": "1", "description": "y", "hub_id": "a/b/c"}]}, "datasets: 'a/b/c' can't be"),
        ({"value_encoding": "rank"}, "value_encoding='rank': pass one of"),
    ],
)
def test_facts_are_strict(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render_card(facts_with(tmp_path, **changes))


@pytest.mark.parametrize("name", NAMES)
def test_card_is_complete(name: str) -> None:
    text = render_card(CARDS / f"{name}.yaml")
    headings = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    assert headings == SECTIONS
    assert not re.search(r"TODO|\{%|Undefined", text)
    assert not re.search(r"\n\n\n|[ \t]\n", text)
    facts = load_facts(CARDS / f"{name}.yaml")
    assert f"{facts.parameters:,}" in text
    assert "Ensembl" in text
    assert "computed: 4 bytes per parameter" in text
    assert "2025.10.23.683759" in text
    assert all(entry.where for entry in facts.measured)


@pytest.mark.parametrize("name", NAMES)
def test_the_hub_knows_the_metadata(name: str) -> None:
    from transformers.pipelines import SUPPORTED_TASKS

    data = check_card(render_card(CARDS / f"{name}.yaml")).data
    assert data.license == "apache-2.0"
    assert data.library_name == "transformers"
    assert data.pipeline_tag in SUPPORTED_TASKS
    assert data.tags == list(dict.fromkeys(data.tags))
    assert data.datasets == (["tahoebio/Tahoe-100M"] if name in RELEASED else None)
    assert data.base_model is None
    # A figure without a source that the Hub could show stands only in the text.
    assert data.eval_results is None
    copy = check_card(render_card(CARDS / f"{name}.yaml", repo_id="someone/copy")).data
    assert copy.base_model == ("tahoebio/Tahoe-x1" if name in RELEASED else None)


def test_sourced_results_go_into_the_model_index(tmp_path: Path) -> None:
    result = {
        "task": "Cell types",
        "metric": "f1",
        "value": 0.5,
        "source": "A report",
        "url": "https://example.org/report",
        "task_type": "feature-extraction",
        "dataset_id": "someone/cells",
    }
    card = check_card(render_card(facts_with(tmp_path, results=[result])))
    (entry,) = card.data.to_dict()["model-index"][0]["results"]
    assert entry["source"] == {"url": "https://example.org/report", "name": "A report"}
    assert entry["metrics"] == [{"type": "f1", "value": 0.5}]
    assert "| Cell types | f1 | 0.5 | [A report](https://example.org/report) |" in card.text
    del result["url"]
    with pytest.raises(ValueError, match="needs url"):
        render_card(facts_with(tmp_path, results=[result]))


def test_command_writes_the_card_and_a_page(tmp_path: Path) -> None:
    pytest.importorskip("markdown_it")
    app = typer.Typer()
    app.command()(runpy.run_path(str(CARDS / "render.py"))["main"])
    output, page = tmp_path / "README.md", tmp_path / "card.html"
    arguments = [str(CARDS / "3b.yaml"), str(output), "--subfolder", "3b", "--repo-id", "me/mine", "--html", str(page)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert output.read_text() == render_card(CARDS / "3b.yaml", repo_id="me/mine", subfolder="3b")
    assert "<h1>Tahoe-x1 3B</h1>" in page.read_text()
    assert "<table>" in page.read_text()
    wrong = CliRunner().invoke(app, [str(facts_with(tmp_path, tags=None))])
    assert wrong.exit_code == 1
    assert "missing key 'tags'" in wrong.output


@pytest.mark.parametrize("name", ["demo", "absent_genes"])
def test_card_of_a_checkpoint_in_examples_is_rendered_from_its_facts(name: str) -> None:
    card = f"examples/{name}_checkpoint/README.md"
    assert (REPO_ROOT / card).read_text(encoding="utf-8") == render_card(CARDS / f"{name}.yaml"), (
        f"run `python model_cards/render.py model_cards/{name}.yaml {card}`"
    )


def prepare(folder: Path, name: str, subfolder: str, variant: str | None) -> str:
    """Lay out the files that a card's examples need, and return the examples, pointed to a small checkpoint."""
    folder.mkdir()
    if variant is None:
        model_id = DEMO
        cells = demo_cells()
    else:
        model_id = folder / "checkpoint"
        convert_original_folder(GOLDEN / variant / "model", model_id / subfolder)
        cells = anndata.read_h5ad(GOLDEN / variant / "adata.h5ad")
        cells.var_names = cells.var.pop("ensembl_id").astype(str)
        cells.obs["drug"] = ["Drug 1", "Drug 2"] * 25
    cells.write_h5ad(folder / "cells.h5ad")
    blocks = python_blocks(render_card(CARDS / f"{name}.yaml", subfolder=subfolder))
    assert len([line for line in blocks[0].splitlines() if line]) <= 10
    code, count = re.subn(r'^model_id = ".*"$', f"model_id = {str(model_id)!r}", "\n".join(blocks), flags=re.MULTILINE)
    assert count == 1
    return code


def demo_cells() -> Any:
    """Return 50 blood cells with Ensembl ids as gene names."""
    pytest.importorskip("scanpy")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPO_ROOT / "examples"))
        from demo_cells import load_cells, load_gene_symbols
    cells, symbols = load_cells()[:50], load_gene_symbols()
    cells = cells[:, [name in symbols for name in cells.var_names]].copy()
    cells.var_names = [symbols[name] for name in cells.var_names]
    return cells


RUNNER = """
import os, sys
from pathlib import Path

import torch

torch.cpu.get_capabilities = lambda: {}  # a CPU without bfloat16, which the examples would otherwise choose
for folder in sys.argv[1:]:
    os.chdir(folder)
    names = {}
    exec(compile(Path("card.py").read_text(), folder, "exec"), names)
    trained, everything = names["adapted"].get_nb_trainable_parameters()
    print(names["outputs"].pooler_output.shape[0], 0 < trained < everything)
"""


@pytest.mark.slow
def test_every_example_runs(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    cards = {
        "root": ("70m", "", "a_70m_like"),
        "middle": ("1_3b", "1.3b", "a_70m_like"),
        "drugs": ("3b", "3b", "b_3b_like_chem"),
        "demo": ("demo", "", None),
    }
    for folder, (name, subfolder, variant) in cards.items():
        code = prepare(tmp_path / folder, name, subfolder, variant)
        (tmp_path / folder / "card.py").write_text(code, encoding="utf-8")
    folders = [str(tmp_path / folder) for folder in cards]
    command = [sys.executable, "-c", RUNNER, *folders]
    result = forked.run(command)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[:-1] == ["4 True"] * len(cards)
    for folder in folders:
        written = anndata.read_h5ad(Path(folder) / "embedded.h5ad").obsm["X_tahoe_x1"]
        assert np.allclose(np.linalg.norm(written, axis=1), 1, atol=1e-5)
    expected = np.load(GOLDEN / "a_70m_like" / "emb_flash.npz")["cell_embs"]
    written = anndata.read_h5ad(tmp_path / "root" / "embedded.h5ad").obsm["X_tahoe_x1"]
    assert np.abs(written - expected).max() < 1e-6
