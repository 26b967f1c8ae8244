"""The report of a run says what it should, and names the right winner."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from tahoex1_hf.finetuning.cells.baselines import classification_baselines, regression_baselines
from tahoex1_hf.finetuning.cells.report import CellResults, compare, read_report, write_cell_report
from tahoex1_hf.finetuning.metrics import classification_metrics, regression_metrics
from tahoex1_hf.finetuning.splits import Split, make_splits
from tahoex1_hf.runs.report import Report, interval

CLASSES = ["B", "NK", "T"]
OURS = "Tahoe-x1, lora"


@pytest.fixture(scope="module", autouse=True)
def _quick_umap(module_monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace UMAP, which compiles for half a minute; tests/training/test_evaluation.py draws with it."""
    module_monkeypatch.setattr("tahoex1_hf.common.plots.umap_places", lambda embeddings, seed: embeddings[:, :2])


@pytest.fixture(scope="module")
def module_monkeypatch() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def cells(num_cells: int = 150) -> tuple[csr_matrix, np.ndarray]:
    random = np.random.default_rng(0)
    kinds = np.arange(num_cells) % 3
    own = np.arange(30) % 3 == kinds[:, None]
    return csr_matrix(random.poisson(np.where(own, 1.4, 0.8)).astype(np.float32)), kinds


def probabilities(truth: np.ndarray, right: float, seed: int = 0) -> np.ndarray:
    """Return the probabilities of a model that is right in about this share of the cells."""
    random = np.random.default_rng(seed)
    chosen = np.where(random.random(len(truth)) < right, truth, (truth + 1) % 3)
    return np.eye(3)[chosen] * 0.8 + 0.2 / 3


def write(folder: Path, right: float, folds: int = 3, **changes: Any) -> dict[str, Any]:
    counts, labels = cells()
    splits = make_splits(labels, folds=folds, seed=0)
    embeddings = [np.random.default_rng(1).normal(size=(len(s.test), 6)) for s in splits]
    arguments: dict[str, Any] = {
        "label": "kind",
        "method": "lora",
        "classes": CLASSES,
        "labels": labels,
        "names": [f"cell{i}" for i in range(len(labels))],
        "splits": splits,
        "predictions": [probabilities(labels[s.test], right, i) for i, s in enumerate(splits)],
        "before": embeddings,
        "after": embeddings,
        "cost": [
            {"trainable_parameters": 1234, "seconds": 2.0 + i, "peak_memory_gb": 0.5} for i in range(len(splits))
        ],
        "seed": 0,
    }
    results = CellResults(**{**arguments, **changes})
    results.check()
    return write_cell_report(folder, results, scores_of(results, counts), OURS)


def scores_of(results: CellResults, counts: csr_matrix) -> Report:
    """Score the model and the baselines as `run_folds` does."""
    classes, labels, splits = results.classes, results.labels, results.splits
    if classes is None:
        baselines = regression_baselines(counts, labels, splits, 0)
    else:
        baselines = classification_baselines(counts, labels, splits, 0, len(classes))
    report = Report(results.task, "cells.h5ad")
    for method, each in {OURS: results.predictions, **baselines}.items():
        folds = [
            regression_metrics(labels[s.test], p)
            if classes is None
            else classification_metrics(labels[s.test], p.argmax(1), p)
            for s, p in zip(splits, each, strict=True)
        ]
        report.add(method, folds, numbers=[len(s.test) for s in splits])
    return report


def test_a_good_model_beats_the_baselines(tmp_path: Path) -> None:
    report = write(tmp_path, right=1.0)
    assert read_report(tmp_path) == report
    assert report["metrics"]["model"]["macro_f1"]["values"] == [1, 1, 1]
    assert report["comparison"]["beats"] is True
    table = pd.read_csv(tmp_path / "scores.csv")
    assert len(table) == len(report["scores"]) > 0
    ours = table[(table["method"] == OURS) & (table["metric"] == "macro_f1")]
    assert ours["value"].tolist() == [1, 1, 1, 1]  # three folds, and their mean
    assert (tmp_path / "scores.png").stat().st_size > 8000
    assert report["classes"] == {"B": 50, "NK": 50, "T": 50}
    text = (tmp_path / "report.md").read_text()
    assert "The model beats the baselines: macro-F1 1.000 [1.000, 1.000]" in text
    for name in ("this model (lora)", "PCA + logistic regression", "PCA + gradient boosting", "majority class"):
        assert re.search(rf"^\| \**{re.escape(name)}\** \| 0?1?\.\d+ \[", text, re.MULTILINE), name
    assert "Trainable parameters: 1,234" in text
    assert "Seconds per split: 3.0" in text


def test_a_bad_model_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="tahoex1_hf"):
        report = write(tmp_path, right=0.4)
    assert report["comparison"]["beats"] is False
    assert report["comparison"]["difference"]["mean"] < 0
    assert "The model does not beat the baselines: macro-F1" in (tmp_path / "report.md").read_text()
    assert "The model does not beat the baselines" in caplog.text  # printed beside every result


def test_predictions_are_of_the_test_cells(tmp_path: Path) -> None:
    _, labels = cells()
    write(tmp_path, right=0.7)
    splits = make_splits(labels, folds=3, seed=0)
    table = pd.read_csv(tmp_path / "predictions.csv")
    assert list(table) == ["cell", "fold", "truth", "prediction", "p_B", "p_NK", "p_T"]
    assert len(table) == len(labels)
    for fold, split in enumerate(splits):
        mine = table[table["fold"] == fold]
        assert mine["cell"].tolist() == [f"cell{row}" for row in split.test]
        assert mine["truth"].tolist() == [CLASSES[label] for label in labels[split.test]]
        expected = probabilities(labels[split.test], 0.7, fold)
        np.testing.assert_allclose(mine[["p_B", "p_NK", "p_T"]].to_numpy(), expected, atol=1e-6)
        assert mine["prediction"].tolist() == [CLASSES[k] for k in expected.argmax(1)]
    accuracy = (table["truth"] == table["prediction"]).groupby(table["fold"]).mean()
    found = json.loads((tmp_path / "report.json").read_text())["metrics"]["model"]["accuracy"]["values"]
    assert found == pytest.approx(accuracy.tolist())


def test_pictures_show_the_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    images: list[np.ndarray] = []
    dots: list[int] = []
    imshow, scatter = Axes.imshow, Axes.scatter
    monkeypatch.setattr(Axes, "imshow", lambda self, x, **more: (images.append(x), imshow(self, x, **more))[1])
    monkeypatch.setattr(
        Axes, "scatter", lambda self, x, y, **more: (dots.append(len(x)), scatter(self, x, y, **more))[1]
    )
    write(tmp_path, right=1.0)
    np.testing.assert_allclose(images[0], np.eye(3))
    assert sum(dots) == 2 * len(make_splits(cells()[1], folds=3, seed=0)[0].test)  # before and after
    for name in ("confusion.png", "umap_before_after.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
        assert (tmp_path / name).stat().st_size > 8000


def test_numbers(tmp_path: Path) -> None:
    _, labels = cells()
    numbers = 10.0 + 3 * labels
    splits = make_splits(numbers, seed=0)
    good = [numbers[s.test] + 0.01 for s in splits]
    embeddings = [np.random.default_rng(1).normal(size=(len(s.test), 6)) for s in splits]
    common = {"classes": None, "labels": numbers, "splits": splits, "before": embeddings, "after": embeddings}
    report = write(tmp_path, 1.0, 1, **common, predictions=good, method="full", cost=[])
    assert report["comparison"]["metric"] == "rmse"
    assert report["comparison"]["beats"] is True
    text = (tmp_path / "report.md").read_text()
    assert "beats the baselines on one test set" in text
    assert "One split has no interval" in text
    assert "| mean |" in text
    table = pd.read_csv(tmp_path / "predictions.csv")
    np.testing.assert_allclose(table["prediction"] - table["truth"], 0.01, atol=1e-6)
    assert (tmp_path / "predicted.png").stat().st_size > 8000
    worse = write(tmp_path, 1.0, 1, **common, predictions=[np.full(len(s.test), 99.0) for s in splits], cost=[])
    assert worse["comparison"]["beats"] is False


def scores(*values: float, name: str = "macro_f1") -> dict[str, Any]:
    return {name: interval(values)}


def test_who_wins() -> None:
    others = {"PCA": scores(0.5, 0.6, 0.7), "majority class": scores(0.1, 0.1, 0.1)}
    beats = compare({"model": scores(0.55, 0.66, 0.74), **others}, "classification")
    assert beats["best_baseline"] == "PCA"
    assert beats["beats"]
    within_chance = compare({"model": scores(0.3, 0.9, 0.75), **others}, "classification")
    assert not within_chance["beats"]
    assert "no more than chance" in within_chance["text"]
    assert "does not beat" in within_chance["text"]
    level = compare({"model": scores(0.5, 0.6, 0.7), **others}, "classification")
    assert not level["beats"]
    lower_is_better = {"model": scores(1.0, 1.1, name="rmse"), "mean": scores(2.0, 2.11, name="rmse")}
    assert compare(lower_is_better, "regression")["beats"]


def test_predictions_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="are of 3 cells"):
        write(tmp_path, 1.0, predictions=[np.ones((3, 3))] * 3)
    nothing = Split(np.arange(150), np.zeros(0, dtype=int), np.zeros(0, dtype=int))
    with pytest.raises(ValueError, match="no test cells"):
        write(tmp_path, 1.0, splits=[nothing], predictions=[np.ones((0, 3))])
