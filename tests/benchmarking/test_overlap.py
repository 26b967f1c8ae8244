"""Models are not tested on the cells that they were trained on."""

import json
from pathlib import Path

import anndata
import numpy as np
import pytest
import yaml

from tahoex1_hf.benchmarking.cells import EvaluationFile, read_cells
from tahoex1_hf.benchmarking.overlap import check_not_trained_on
from tahoex1_hf.benchmarking.sources import Source
from tahoex1_hf.cells.fingerprint import content_fingerprint

DEMO = Path(__file__).parents[2] / "examples" / "demo_checkpoint"


def cells(folder: Path, reference: str = "", name: str = "gut_cells") -> EvaluationFile:
    adata = anndata.AnnData(np.ones((2, 2), dtype=np.float32), uns={"reference": reference})
    adata.var_names = ["ENSG00000141510", "ENSG00000146648"]
    adata.write_h5ad(folder / f"{name}.h5ad")
    return read_cells(folder / f"{name}.h5ad")


def model(folder: Path) -> Source:
    path = folder / "run" / "model"
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return Source("ours", "model", str(path))


def test_demo_checkpoint_is_not_tested_on_its_publication(tmp_path: Path) -> None:
    demo = Source("demo", "model", str(DEMO))
    with pytest.raises(ValueError, match=r"Zheng et al\. 2017, from which these cells are"):
        check_not_trained_on(demo, cells(tmp_path, "Zheng et al. 2017, Nat. Commun."))
    assert check_not_trained_on(demo, cells(tmp_path, "Kong et al. 2023 Immunity")) is None


def test_model_without_a_record_gets_a_note(tmp_path: Path) -> None:
    note = check_not_trained_on(model(tmp_path), cells(tmp_path))
    assert note is not None
    assert "no record of its training data" in note


def test_file_that_the_settings_of_the_run_name(tmp_path: Path) -> None:
    source = model(tmp_path)
    settings = tmp_path / "run" / "config.resolved.yaml"
    settings.write_text(yaml.safe_dump({"datasets": ["/data/other_gut_cells"]}))
    assert check_not_trained_on(source, cells(tmp_path)) is None
    settings.write_text(yaml.safe_dump({"data": "/data/gut_cells.h5ad"}))
    with pytest.raises(ValueError, match="names the file gut_cells"):
        check_not_trained_on(source, cells(tmp_path))
    settings.write_text(yaml.safe_dump({"note": "blood cells"}))
    assert check_not_trained_on(source, cells(tmp_path, name="cells")) is None


def test_file_of_another_name_that_a_prepared_dataset_was_made_of(tmp_path: Path) -> None:
    source, tested = model(tmp_path), cells(tmp_path)
    (tmp_path / "prepared").mkdir()
    entry = {"path": "renamed.h5ad", "fingerprint": content_fingerprint(tested.path)}
    (tmp_path / "prepared" / "manifest.json").write_text(json.dumps({"sources": [{"files": [entry]}]}))
    settings = yaml.safe_dump({"datasets": [str(tmp_path / "prepared")]})
    (tmp_path / "run" / "config.resolved.yaml").write_text(settings)
    with pytest.raises(ValueError, match="a file with the same content"):
        check_not_trained_on(source, tested)
