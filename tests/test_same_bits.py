"""The same inputs give the same bits, in outputs and gradients, however busy the machine and whatever the threads.

Where several threads add to the same place, the order of the additions, and with it the last bit, is chance. Such an
operation differs between repetitions as soon as its threads do not run in step: hence the busy neighbour below, and
tensors large enough that torch shares them out (32,768 numbers a thread).
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers import DRUG, make_batch, packed, tiny_config, tiny_model

from tahoex1_hf import (
    TahoeX1ForSequenceClassification,
    TahoeX1ForTokenClassification,
    TahoeX1Model,
)
from tahoex1_hf.inference.encoder import GeneMeans
from tahoex1_hf.inference.ragged import ragged_forward
from tahoex1_hf.packing_tahoe_x1 import CellLayout
from tahoex1_hf.training.metrics import batch_sums

REPETITIONS = {1: 3, 2: 20, 3: 20}  # by number of threads: a single thread has none to race with
# 610 tokens of 64 numbers are more than one thread's share. Two threads meet in the second cell, three in the first
# and the third. The second is long enough to attend to its observed tokens alone.
LENGTHS = (210, 260, 110, 30)
SIZES = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 1, "expression_decoder_layers": 1}
DRUGS = {"num_drugs": 6, "drug_fingerprint_size": 64, "drug_token_id": DRUG}
PRETRAINED: dict[str, dict[str, Any]] = {
    "full": {**DRUGS, "num_key_value_heads": 2, "use_glu": True, "norm_position": "post"},
    "observed_or_self": {**DRUGS, "attention_mask_style": "observed_or_self", "cell_pooling": "mean"},
}
Results = list[torch.Tensor]
Run = Callable[[], Results]


@pytest.fixture(scope="module", autouse=True)
def busy_neighbour() -> Iterator[None]:
    """Keep a core busy beside the tests, so that their threads do not run in step."""
    # The neighbour ends by itself where the tests are killed. It gives way to all others: on a quiet machine it takes
    # the second core, and where the machine is busy its neighbours do its work.
    script = "import os\nos.nice(19)\nparent = os.getppid()\nwhile os.getppid() == parent: pass"
    neighbour = subprocess.Popen([sys.executable, "-S", "-c", script])
    yield
    neighbour.kill()
    neighbour.wait()


@pytest.fixture(params=[1, 2, 3], ids="{} threads".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def differing(run: Run) -> int:
    """Count the repetitions that differ from the first in any bit."""
    first = run()
    assert all(tensor.isfinite().all() for tensor in first)
    return sum(not all(map(torch.equal, first, run())) for _ in range(REPETITIONS[torch.get_num_threads()] - 1))


def with_gradients(model: Any, arguments: dict[str, Any]) -> Run:
    def run() -> Results:
        model.zero_grad()
        outputs = model(**arguments)
        outputs.loss.backward()
        found = [value for value in outputs.values() if torch.is_tensor(value)]
        return [*found, *(each.grad for each in model.parameters() if each.grad is not None)]

    return run


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("shape", PRETRAINED)
def test_pretraining(shape: str, layout: str, threads: int) -> None:
    config = tiny_config(**SIZES, **PRETRAINED[shape], expression_encoder_dropout=0.0)
    model, batch = tiny_model(config).train(), make_batch(config, LENGTHS)
    assert differing(with_gradients(model, packed(batch) if layout == "packed" else batch)) == 0


def test_attention_in_plain_torch(threads: int) -> None:
    config = tiny_config(**SIZES, **PRETRAINED["observed_or_self"], expression_encoder_dropout=0.0)
    model = tiny_model(config, attention="eager").train()
    assert differing(with_gradients(model, make_batch(config, LENGTHS))) == 0


@pytest.mark.parametrize("task", ["classification", "regression", "genes"])
def test_heads(task: str, threads: int) -> None:
    problem = "regression" if task == "regression" else "single_label_classification"
    kinds = {"num_labels": 1 if task == "regression" else 3, "problem_type": problem}
    config = tiny_config(**SIZES, **DRUGS, **kinds, expression_encoder_dropout=0.0, classifier_dropout=0.0)
    kind = TahoeX1ForTokenClassification if task == "genes" else TahoeX1ForSequenceClassification
    model, batch = tiny_model(config, kind).train(), make_batch(config, LENGTHS, targets=False)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, batch["input_ids"].shape if task == "genes" else (4,), generator=generator)
    if task == "genes":
        batch["labels"] = labels
    arguments = packed(batch)
    if task != "genes":
        arguments["labels"] = labels.float() if task == "regression" else labels
    assert differing(with_gradients(model, arguments)) == 0


def test_sums_of_an_evaluation(threads: int) -> None:
    config = tiny_config(**SIZES)
    # Rank correlations go over all targets; there are many, so that threads share their sums.
    batch = packed(make_batch(config, LENGTHS * 120))
    generator = torch.Generator().manual_seed(0)
    shape = batch["input_ids"].shape
    names = ("expression_predictions", "cell_expression_predictions")
    outputs = {name: torch.randn(shape, generator=generator) for name in names}
    counts = torch.randint(1, 9, shape, generator=generator).float()
    assert batch["target_mask"].sum() > 32768
    assert differing(lambda: [batch_sums(outputs, batch, counts, (1.0, 0.0)).values]) == 0


@pytest.mark.parametrize("wanted", ["cells", "genes"])
def test_inference_without_padding(wanted: str, threads: int) -> None:
    config = tiny_config(**SIZES | {"num_hidden_layers": 2}, **DRUGS)
    model, batch = tiny_model(config, TahoeX1Model), packed(make_batch(config, LENGTHS, targets=False))
    cells = batch["input_ids"][0], batch["expression_values"][0], batch["cu_seq_lens_q"].numpy(), batch["drug_ids"]

    def run() -> Results:
        pooled, hidden = ragged_forward(model, *cells, all_tokens=wanted == "genes")
        if hidden is None:
            return [pooled]
        means = GeneMeans(np.arange(300), 300, 64, torch.device("cpu"))
        means.add(cells[0].unsqueeze(0), hidden.unsqueeze(0))
        return [pooled, hidden, torch.from_numpy(means.state()["sums"])]

    assert differing(run) == 0


def spread(per_token: Callable[[CellLayout, torch.Tensor], torch.Tensor]) -> Run:
    """Give every token its cell's vector, forward and backward, as the drugs' vectors are given to tokens."""
    # So many tokens that the threads, which share them out, meet within a cell in nearly every run.
    boundaries = torch.tensor([0, *LENGTHS]).cumsum(0) * 32
    layout = CellLayout.packed(boundaries, torch.Size((1, int(boundaries[-1]))))
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(int(boundaries[-1]), 64, generator=generator)
    vectors = torch.randn(len(LENGTHS), 64, generator=generator, requires_grad=True)

    def run() -> Results:
        vectors.grad = None
        per_token(layout, vectors).view_as(gradient).backward(gradient)
        assert vectors.grad is not None
        return [vectors.grad]

    return run


def test_an_operation_that_adds_in_any_order_is_found() -> None:
    """Indexing by the cell of each token, as the code once did, adds with atomic operations in its backward pass."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for per_token, same in (
            (lambda layout, vectors: vectors[layout.token_cells], False),
            (CellLayout.per_token, True),
        ):
            run = spread(per_token)
            first = run()
            # Of the wrong way one run in four differs, so forty of the right way leave no doubt.
            assert all(all(map(torch.equal, first, run())) for _ in range(40 if same else 10_000)) == same
    finally:
        torch.set_num_threads(before)
