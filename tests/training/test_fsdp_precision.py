"""FSDP2 in half precision rounds only what it should, and the memory of a microbatch is measured correctly."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from helpers import tiny_config
from training_memory import line, loss, training_model
from training_runs import environment

from benchmarks import memory_model as memory
from benchmarks.memory_model import CPU_FLOAT32
from tahoex1_hf.training.microbatches import PassMemory

CHILD = Path(__file__).parents[1] / "support" / "fsdp_precision_run.py"


def run_of_two(precision: str, place: Path) -> dict[str, Any]:
    done = forked.launch(2, [sys.executable, CHILD, precision, place / "seen.json"], environment("fsdp"))
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads((place / "seen.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_of_two("bf16", tmp_path_factory.mktemp("bf16"))


def test_microbatches_are_one_step_under_fsdp(tmp_path: Path) -> None:
    """All sixteen cells at once, four by four, one by one, and as many as fit agree to float32's last digits."""
    seen = run_of_two('"no"', tmp_path)
    for size in ("4", "1", "None"):
        for found, expected in zip(seen[size]["curve"], seen["16"]["curve"], strict=True):
            assert found == pytest.approx(expected, rel=2e-5)
    assert [len(seen[size]["left"]) for size in ("16", "4", "1")] == [1, 4, 16]


def test_gradients_are_added_up_in_float32(half: dict[str, Any]) -> None:
    """In bfloat16 the sums would be 0.3 % off after four passes, and more after sixteen."""
    for size in ("16", "4", "1"):
        assert half[size]["apart"] < 1e-6


def test_gradients_are_shards_after_every_pass(half: dict[str, Any]) -> None:
    for size in ("16", "4", "1"):
        left = half[size]["left"]
        assert [last for last, *_ in left] == [False] * (len(left) - 1) + [True]
        assert all(dtypes == ["torch.float32"] for _, _, dtypes, _ in left)
        assert all(share < 0.55 for *_, share in left)


def test_copies_of_shards_are_exchanged_once_a_step(half: dict[str, Any]) -> None:
    assert half["hsdp"]["waiting"] == [True, True, True, False]
    assert half["hsdp"]["apart"] < 1e-6


def test_losses_keep_their_digits(half: dict[str, Any]) -> None:
    """Rounded to bfloat16, the first loss of 887.8 would be 887.0, 888.3 or 887.6, depending on the microbatches."""
    first = [half[size]["curve"][0] for size in ("16", "4", "1")]
    for found_loss, norm in first[1:]:
        assert found_loss == pytest.approx(first[0][0], rel=1e-6)
        assert norm == pytest.approx(first[0][1], rel=5e-4)  # the weights' gradients are rounded in each pass
    found = torch.tensor([value for value, _ in half["1"]["curve"]])
    assert not torch.equal(found, found.bfloat16().float())
    handed_out = {name: types[0] for name, types in half["types"].items()}
    assert set(handed_out.values()) == {"torch.float32"}
    assert {"loss", "expression_predictions", "cell_expression_predictions"} <= handed_out.keys()
    # The loss is computed in float32, from predictions in bfloat16.
    assert half["types"]["loss"][1] == "torch.float32"
    assert half["types"]["expression_predictions"][1] == "torch.bfloat16"


def test_the_search_for_a_microbatch_leaves_no_gradient(half: dict[str, Any]) -> None:
    assert half["None"]["size"] == 16
    assert half["None"]["curve"] == half["16"]["curve"]


def test_fsdp_gives_no_warning(half: dict[str, Any]) -> None:
    assert half["views"] == 0


# Memory of a pass ---------------------------------------------------------------------------------------


def needed(layers: int, checkpointing: bool) -> Callable[[int], float]:
    config = tiny_config(hidden_size=64, vocab_size=200, num_hidden_layers=layers)
    model, measure = training_model(config, CPU_FLOAT32), PassMemory(torch.device("cpu"))
    if checkpointing:
        model.gradient_checkpointing_enable()
    return lambda cells: measure(lambda: loss(model, CPU_FLOAT32, cells, 128).backward())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["whole", "checkpointed"])
def test_a_pass_needs_what_autograd_keeps(checkpointing: bool) -> None:
    """A layer needs what it keeps, or its input where it is checkpointed; a pass needs no more than predicted."""
    per_token = {}
    for layers in (4, 12):
        # With fewer cells the peak comes at the end, when all gradients of weights are there.
        slope, _ = line(needed(layers, checkpointing), 6, 10)
        per_token[layers] = slope / 128
        config = tiny_config(hidden_size=64, vocab_size=200, num_hidden_layers=layers)
        kept = memory.kept_per_token(config, CPU_FLOAT32, 128, checkpointing=checkpointing)
        most = memory.microbatch_bytes(config, CPU_FLOAT32, 128, 1, checkpointing=checkpointing) / 128
        assert kept < per_token[layers] < most
    layer = memory.layer_per_token(config, CPU_FLOAT32, 128)
    expected = 64 * 4 if checkpointing else layer
    assert (per_token[12] - per_token[4]) / 8 == pytest.approx(expected, rel=0.05)


def test_views_and_existing_tensors_are_not_counted() -> None:
    measure, weight = PassMemory(torch.device("cpu")), torch.ones(1000, 10)
    before = torch.zeros(1000, 10)

    def work() -> None:
        before.add_(1)
        weight.t()[0] += 1
        weight.mul(2)
        torch.ones(500, 10).view(10, 500).t()

    assert measure(work) == 40_000
