"""Test the table of scores: rows, intervals, CSV, Markdown, cards and pictures."""

import json
from pathlib import Path

import pandas as pd
import pytest
from scipy.stats import ttest_1samp

from tahoex1_hf.runs.report import COLUMNS, Report, Score, format_value, interval


def two_methods() -> Report:
    report = Report("classification", "cells.h5ad")
    ours = [{"accuracy": 0.8, "auroc": 0.9}, {"accuracy": 0.6}, {"accuracy": 0.7, "auroc": 0.8}]
    report.add("model", ours, numbers=[10, 20, 30], seconds=[1.0, 2.0, 6.0])
    report.add("majority class", [{"accuracy": 0.5}] * 3, numbers=[10, 20, 30])
    return report


def test_a_row_per_fold_and_one_for_the_mean() -> None:
    scores = two_methods().scores
    accuracy = [score for score in scores if (score.method, score.metric) == ("model", "accuracy")]
    assert [score.fold for score in accuracy] == [0, 1, 2, None]
    assert [score.value for score in accuracy] == pytest.approx([0.8, 0.6, 0.7, 0.7])
    assert [score.n for score in accuracy] == [10, 20, 30, 60]
    assert [score.seconds for score in accuracy] == [1, 2, 6, 3]
    assert all(score.lower is None for score in accuracy[:3])
    expected = ttest_1samp([0.8, 0.6, 0.7], 0).confidence_interval(0.95)
    assert (accuracy[3].lower, accuracy[3].upper) == pytest.approx((expected.low, expected.high))
    auroc = [score for score in scores if score.metric == "auroc"]
    assert [(score.fold, score.n) for score in auroc] == [(0, 10), (2, 30), (None, 40)]  # only where it is defined
    assert {score.seconds for score in scores if score.method == "majority class"} == {None}


def test_units_within_a_fold_have_an_interval() -> None:
    report = Report("drug_response", "screen.h5ad")
    report.add("model", [{"pearson": [0.1, 0.3, 0.5]}, {"pearson": [0.2, 0.4]}], numbers=[9, 6], split="held-out drug")
    first, second, mean = report.scores
    wanted = interval([0.1, 0.3, 0.5, 0.2, 0.4])
    assert (mean.value, mean.lower, mean.upper, mean.n) == (wanted["mean"], wanted["low"], wanted["high"], 15)
    assert first.lower == pytest.approx(interval([0.1, 0.3, 0.5])["low"])
    assert second.split == "held-out drug"


def test_csv_has_the_columns_of_every_report() -> None:
    assert ",".join(COLUMNS) == "task,dataset,split,fold,method,metric,value,lower,upper,n,seconds"
    lines = two_methods().csv().splitlines()
    assert lines[0] == ",".join(COLUMNS)
    assert lines[1] == "classification,cells.h5ad,test,0,model,accuracy,0.8,,,10,1.0"
    assert len(lines) == 1 + 4 + 3 + 4


def test_markdown_has_a_row_per_method() -> None:
    report = two_methods()
    table = report.markdown({"auroc": "AUROC", "f1": "F1", "accuracy": "accuracy"}, {"model": "**model**"})
    header, _, ours, majority = table.splitlines()
    assert header == "|  | AUROC | accuracy |"
    assert ours.startswith("| **model** | 0.850 [")
    assert majority == "| majority class | - | 0.500 [0.500, 0.500] |"
    assert report.markdown(corner="method", digits=1).splitlines()[0] == "| method | accuracy | auroc |"
    assert format_value(123.456) == "123.46"
    assert format_value(123.456, digits=4) == "123.4560"
    assert format_value(0.12345, 0.1, 0.2, digits=2) == "0.12 [0.10, 0.20]"


def test_cards_and_summaries_have_the_means() -> None:
    report = two_methods()
    assert report.card_rows("model", {"auroc": "AUROC"}) == pytest.approx({"accuracy": 0.7, "AUROC": 0.85})
    summary = report.summaries()["model"]["accuracy"]
    assert summary["values"] == [0.8, 0.6, 0.7]
    assert summary["mean"] == pytest.approx(0.7)
    assert report.means()["majority class"]["accuracy"].value == 0.5


def test_files(tmp_path: Path) -> None:
    report = two_methods()
    report.write(tmp_path, {"label": "kind"}, "# Title\n", "accuracy")
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["label"] == "kind"
    assert [Score(**row) for row in content["scores"]] == report.scores
    assert (tmp_path / "report.md").read_text() == "# Title\n"
    table = pd.read_csv(tmp_path / "scores.csv")
    assert tuple(table) == COLUMNS
    assert table["fold"].isna().sum() == 3
    assert (tmp_path / "scores.png").read_bytes()[:4] == b"\x89PNG"


def test_folds_in_which_a_metric_is_not_defined_are_left_out_of_its_mean() -> None:
    report = Report("regression", "cells")
    report.add("model", [{"r2": 0.5}, {"r2": 0.7, "pearson": 0.9}], numbers=[10, 20])
    found = report.summaries()["model"]
    assert found["r2"]["mean"] == pytest.approx(0.6)
    assert found["pearson"]["values"] == [0.9]
