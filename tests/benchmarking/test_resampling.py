"""Bootstrap intervals, verdicts, and the metrics against scikit-learn's."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, normalized_mutual_info_score, roc_auc_score

from tahoex1_hf.benchmarking.resampling import Measurement, auroc, bootstrapped, compare, ends, macro_auprc, macro_f1

TRUTH = np.random.default_rng(0).integers(0, 2, 400)


def measured(share_right: float, seed: int, truth: np.ndarray = TRUTH) -> Measurement:
    right = np.random.default_rng(seed).random(len(truth)) < share_right
    replicates = bootstrapped(macro_f1, truth, np.where(right, truth, 1 - truth), np.arange(len(truth)), len(truth))
    return Measurement("", "kNN", "all", "macro_f1", replicates[None], [len(truth)], [0.0])


def test_metrics_are_scikit_learns() -> None:
    random = np.random.default_rng(1)
    truth, predicted = random.integers(0, 5, 60), random.integers(1, 7, 60)
    assert macro_f1(truth, predicted) == pytest.approx(f1_score(truth, predicted, average="macro"), abs=1e-12)
    scores = random.integers(0, 4, len(TRUTH)) / 4  # with ties, as a forest's are
    assert auroc(TRUTH, scores) == pytest.approx(roc_auc_score(TRUTH, scores), abs=1e-12)
    assert np.isnan(auroc(np.ones(3), scores[:3]))
    members, odds = random.random((50, 6)) < 0.2, random.integers(0, 5, (50, 6))
    members[:, 4] = False  # a column without a positive row does not count
    each = [average_precision_score(members[:, n], odds[:, n]) for n in (0, 1, 2, 3, 5)]
    assert macro_auprc(members, odds) == pytest.approx(np.mean(each), abs=1e-12)
    assert np.isnan(macro_auprc(members[:, 4:5], odds[:, 4:5]))


def test_interval_is_that_of_a_share() -> None:
    truth = np.zeros(400, dtype=np.int64)
    predicted = (np.arange(400) < 100).astype(np.int64)
    low, high = ends(bootstrapped(lambda t, p: float((t == p).mean()), truth, predicted, np.arange(400), 400))
    half = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    # The ends of 500 replicates are known to about a tenth of the interval.
    assert (low, high) == pytest.approx((0.75 - half, 0.75 + half), abs=0.01)


def test_verdicts() -> None:
    good, same, bad = measured(0.9, 1), measured(0.9, 2), measured(0.7, 3)
    assert compare(good, bad)["verdict"] == "better"
    assert compare(bad, good)["verdict"] == "worse"
    assert compare(good, same)["verdict"] == "equal within the interval"
    assert compare(good, good) == {"difference": 0, "lower": 0, "upper": 0, "verdict": "equal within the interval"}


def test_sources_that_were_tested_on_other_rows_are_not_compared() -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        compare(measured(0.9, 1), measured(0.9, 1, TRUTH[:300]))


def test_interval_of_clusters_by_chance_holds_their_value() -> None:
    """Rows that are there twice agree with themselves, which alone would put the interval above the value."""
    random = np.random.default_rng(0)
    truth, clusters = random.integers(0, 5, 400), random.integers(0, 8, 400)
    replicates = bootstrapped(
        lambda t, c: float(normalized_mutual_info_score(t, c)), truth, clusters, np.arange(400), 400
    )
    assert np.percentile(replicates[1:], 2.5) > replicates[0]
    low, high = ends(replicates)
    assert low < replicates[0] < high


def test_folds_that_test_the_same_rows_do_not_pass_for_independent() -> None:
    """Half the rows are right: the interval of the mean over folds is that of one fold, however often it is there."""
    right = np.arange(400) % 2
    every = np.arange(400)

    def measurement(folds: list[np.ndarray]) -> Measurement:
        values = [bootstrapped(lambda t, p: float(p.mean()), right[rows], right[rows], rows, 400) for rows in folds]
        return Measurement("", "", "", "", np.stack(values), [len(rows) for rows in folds], [0.0] * len(folds))

    once, again = measurement([every]).bounds(), measurement([every, every, every]).bounds()
    assert again == pytest.approx(once, abs=1e-12)
    # Folds of other rows together are the whole data.
    apart = measurement([every[:200], every[200:]]).bounds()
    assert apart == pytest.approx(once, abs=0.01)


def test_resample_in_which_a_fold_is_not_defined_is_the_mean_of_the_others() -> None:
    replicates = np.array([[1.0, 2.0, np.nan], [3.0, np.nan, np.nan]])
    low, high = Measurement("", "", "", "", replicates, [1, 1], [0.0, 0.0]).bounds()
    assert (low, high) == (2, 2)  # the one resample that there is, moved onto the value
