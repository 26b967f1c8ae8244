"""The numbers of cz-benchmarks' own tasks, which its version 0.15.1 computes from the same embeddings."""

import numpy as np
import pandas as pd
import pytest

from tahoex1_hf.benchmarking import resampling
from tahoex1_hf.benchmarking.cz_benchmarks import SPLIT, cz_scores


@pytest.mark.parametrize("classes", [2, 4])
def test_numbers_are_those_of_cz_benchmarks(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(
        "czbenchmarks", reason="cz-benchmarks clashes with our numcodecs: make test-evaluate installs it"
    )
    from czbenchmarks.tasks import clustering, embedding, label_prediction
    from sklearn.metrics import silhouette_samples

    monkeypatch.setattr(resampling, "REPLICATES", 2)
    random = np.random.default_rng(classes)
    labels = np.concatenate([np.repeat(np.arange(classes), 60), [classes] * 4])  # the last class is too small
    features = random.normal(labels[:, None] * 0.4, 1, (len(labels), 8)).astype(np.float32)
    found = {(m.reader, m.metric): m.value for m in cz_scores(features, labels)}
    assert {m.split for m in cz_scores(features, labels)} == {SPLIT}
    text = pd.Series(labels.astype(str))
    task = label_prediction.MetadataLabelPredictionTask()
    for result in task.run(features, label_prediction.MetadataLabelPredictionTaskInput(labels=text)):
        reader = {"knn": "kNN", "lr": "logistic regression", "rf": "random forest"}.get(result.params["classifier"])
        metric = {"mean_fold_f1": "macro_f1", "mean_fold_accuracy": "accuracy"}.get(result.metric_type.value)
        if reader and metric:
            assert found.pop((reader, metric)) == pytest.approx(result.value, abs=1e-6), (reader, metric)
    obs = pd.DataFrame(index=[str(n) for n in range(len(labels))])
    task = clustering.ClusteringTask()
    for result in task.run(features, clustering.ClusteringTaskInput(obs=obs, input_labels=text, use_rep="X")):
        metric = {"adjusted_rand_index": "ari", "normalized_mutual_info": "nmi"}[result.metric_type.value]
        assert found.pop(("Leiden", metric)) == pytest.approx(result.value, abs=1e-6), metric
    assert not found
    # Its silhouette is between 0 and 1, ours between -1 and 1.
    (result,) = embedding.EmbeddingTask().run(features, embedding.EmbeddingTaskInput(input_labels=text))
    assert result.value == pytest.approx((silhouette_samples(features, labels).mean() + 1) / 2, abs=1e-6)


def test_classes_of_few_cells_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "REPLICATES", 2)
    labels = np.repeat([0, 1, 2], [20, 20, 9])
    features = np.eye(3)[labels] + np.random.default_rng(0).normal(0, 0.05, (49, 3))
    found = [m for m in cz_scores(features, labels) if m.reader == "kNN"]
    assert [sum(m.numbers) for m in found] == [40, 40]
    assert [m.value for m in found] == [1, 1]
    assert not [m for m in cz_scores(features, np.arange(49) // 9) if m.reader == "kNN"]
