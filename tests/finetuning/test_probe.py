"""The linear probe is an exact fit, which the embeddings' last digits do not move; heads can start from it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from finetuning_runs import labelled_cells, make_config, result, write_base
from helpers import largest_difference
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss

from tahoex1_hf.finetuning import probe
from tahoex1_hf.finetuning.bases import load_tokenizer
from tahoex1_hf.finetuning.cells.labelled import read_cells
from tahoex1_hf.finetuning.config import ClassificationConfig, FinetuneConfig, RegressionConfig
from tahoex1_hf.finetuning.probe import fit_probe, some_of_each
from tahoex1_hf.finetuning.running import finetune
from tahoex1_hf.finetuning.splits import Split
from tahoex1_hf.finetuning.trainer import FinetuneTrainer
from tahoex1_hf.hub.adapters import load_adapter

TRAIN, VALIDATION, TEST = np.arange(150), np.arange(150, 200), np.arange(200, 260)
SPLIT = Split(TRAIN, VALIDATION, TEST)


def embeddings(num_cells: int = 260, width: int = 48) -> np.ndarray:
    """Return features like those of models: far from zero, with few large directions and many small ones."""
    random = np.random.default_rng(0)
    directions = np.linalg.qr(random.normal(size=(width, width)))[0] * 0.5 ** np.arange(width)[:, None].clip(max=12)
    return (random.normal(size=(num_cells, width)) @ directions + random.normal(size=width)).astype(np.float32)


def labelled(num_classes: int) -> tuple[np.ndarray, Any]:
    features = embeddings()
    scores = (features - features.mean(0)) @ np.random.default_rng(1).normal(size=(features.shape[1], num_classes))
    scores += np.random.default_rng(2).gumbel(size=scores.shape) * 0.3
    names = [f"c{number}" for number in range(num_classes)]
    return features, SimpleNamespace(labels=scores.argmax(1), classes=names)


def settings(task: str = "classification", class_weights: str = "balanced") -> FinetuneConfig:
    """Return the part of a configuration that a probe reads."""
    if task == "regression":
        return RegressionConfig.model_construct(task=task)
    return ClassificationConfig.model_construct(task=task, class_weights=class_weights)


@pytest.mark.parametrize("num_classes", [2, 6])
def test_last_digits_of_the_embeddings_do_not_become_visible(num_classes: int) -> None:
    features, cells = labelled(num_classes)
    signs = np.random.default_rng(3).choice([-1, 1], features.shape).astype(np.float32)
    moved = np.nextafter(features, features + signs)
    assert 0 < np.abs(moved - features).max() < 1e-6
    fits = [(x, *fit_probe(x, cells, SPLIT, settings())) for x in (features, moved)]
    logits = [x @ weights.T + bias for x, weights, bias in fits]
    assert np.abs(logits[0] - logits[1]).max() < 1e-5 * np.abs(logits[0]).max()


@pytest.mark.parametrize("num_classes", [2, 6])
def test_the_fit_is_the_minimum_of_the_penalised_loss(num_classes: int) -> None:
    features, cells = labelled(num_classes)
    weights, bias = fit_probe(features, cells, SPLIT, settings(class_weights="none"))
    x = features[TRAIN].astype(np.float64)
    x = (x - x.mean(0)) / (scale := x.std(0))
    logits = features[TRAIN].astype(np.float64) @ weights.T + bias
    chances = np.exp(logits - logits.max(1, keepdims=True))
    residuals = chances / chances.sum(1, keepdims=True) - np.eye(num_classes)[cells.labels[TRAIN]]
    slopes, penalised = residuals.T @ x, weights * scale
    if num_classes == 2:  # the two classes share one row of weights
        slopes, penalised = slopes[1:], penalised[1:]
    # At a minimum the gradient of C times the loss equals the negative weights; C is one of the values that are tried.
    strength = -(penalised * slopes).sum() / (slopes**2).sum()
    assert min(abs(np.log10(strength) - np.log10(each)) for each in probe._STRENGTHS) < 1e-4
    assert np.abs(penalised + strength * slopes).max() < 1e-4 * np.abs(penalised).max()
    assert np.abs(residuals.sum(0)).max() < 1e-4  # the bias is not penalised


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_the_validation_cells_choose_the_strength(task: str) -> None:
    features, cells = labelled(6)
    if task == "regression":
        noise = np.random.default_rng(4).normal(0, 0.1, 260)
        cells = SimpleNamespace(labels=features @ np.random.default_rng(5).normal(size=48) + noise, classes=None)
    weights, bias = fit_probe(features, cells, SPLIT, settings(task, "none"))
    x = (features - features[TRAIN].mean(0)) / features[TRAIN].std(0)
    outputs = features[VALIDATION] @ weights.T + bias
    losses = []
    for strength in probe._STRENGTHS:
        if task == "regression":
            model = Ridge(alpha=1 / strength).fit(x[TRAIN].astype(np.float64), cells.labels[TRAIN])
            losses.append(float(((model.predict(x[VALIDATION]) - cells.labels[VALIDATION]) ** 2).mean()))
        else:
            model = LogisticRegression(C=strength, max_iter=5000).fit(x[TRAIN].astype(np.float64), cells.labels[TRAIN])
            losses.append(log_loss(cells.labels[VALIDATION], model.predict_proba(x[VALIDATION]), labels=range(6)))
    if task == "regression":
        found = float(((outputs[:, 0] - cells.labels[VALIDATION]) ** 2).mean())
    else:
        chances = np.exp(outputs - outputs.max(1, keepdims=True))
        found = log_loss(cells.labels[VALIDATION], chances / chances.sum(1, keepdims=True), labels=range(6))
    assert 0 < int(np.argmin(losses)) < len(losses) - 1  # there is something to choose
    assert found == pytest.approx(min(losses), rel=1e-3)


def test_test_cells_are_not_looked_at() -> None:
    features, cells = labelled(6)
    expected = fit_probe(features, cells, SPLIT, settings())
    features[TEST], cells.labels[TEST] = np.nan, 0
    found = fit_probe(features, cells, SPLIT, settings())
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


# Heads that start from a probe --------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cells") / "cells.h5ad"
    labelled_cells(120).write_h5ad(path)
    return path


@pytest.mark.parametrize(("task", "label"), [("classification", "kind"), ("regression", "dose")])
def test_training_starts_from_a_fitted_head(task: str, label: str, base: Path, data: Path, tmp_path: Path) -> None:
    outputs = {}
    for name, changes in {
        "probe": {"method": "linear_probe"},
        "fitted": {"head_start": "probe"},
        "random": {"head_start": "random"},
    }.items():
        changes = {"task": task, "label": label, "epochs": 0.1, "learning_rate": 1e-7, **changes}
        finetune(make_config(base, data, tmp_path / name, **changes))
        outputs[name] = result(tmp_path / name)[1]["outputs"]
    # Compared after a step that changes next to nothing.
    assert largest_difference(outputs["fitted"], outputs["probe"]) < 1e-4 * np.abs(outputs["probe"]).max()
    assert largest_difference(outputs["random"], outputs["probe"]) > 0.1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"head_start": "probe"}, 0.0),
        ({"head_start": "random"}, 0.4),
        ({"head_start": "probe", "method": "head_only"}, 0.4),
        ({"head_start": "probe", "expression_encoder_dropout": 0.2}, 0.2),
        ({"task": "masked_expression", "label": None}, 0.4),
    ],
)
def test_dropout_does_not_drown_what_a_fitted_head_sees(
    changes: dict[str, Any], expected: float, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_base(tmp_path / "base", expression_encoder_dropout=0.4)
    seen = []
    step = FinetuneTrainer.training_step

    def looked_at(self: Any, model: Any, *arguments: Any) -> Any:
        seen.extend(layer.p for name, layer in model.named_modules() if name.endswith("expression_encoder.dropout"))
        return step(self, model, *arguments)

    monkeypatch.setattr(FinetuneTrainer, "training_step", looked_at)
    finetune(make_config(base, data, tmp_path / "run", **{"epochs": 0.1, **changes}))
    assert set(seen) == {expected}
    model, _ = load_adapter(tmp_path / "run")
    assert model.config.expression_encoder_dropout == 0.4  # the base's own, for training it further


def test_a_head_starts_from_cells_of_every_class(base: Path, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    config = make_config(base, data, tmp_path)
    cells = read_cells(config, load_tokenizer(config), tmp_path)
    monkeypatch.setattr("tahoex1_hf.finetuning.probe._START_CELLS", 30)
    rows = some_of_each(np.arange(5, 120), cells, seed=0)
    assert np.bincount(cells.labels[rows]).tolist() == [10, 10, 10]
    assert set(rows) <= set(range(5, 120))
