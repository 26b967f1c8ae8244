"""No pass over a batch makes the host wait for a GPU, shown without one.

torch's fake tensors have a shape but no content, and raise an error where the host asks for a number, or for a shape
that depends on numbers: on a GPU, it would wait there. They stand for a GPU's tensors, with attention as on a GPU.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from flash_stand_in import FlashStandIn, flash_on_cpu  # noqa: F401 - a fixture
from helpers import make_batch, packed, tiny_config
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from tahoex1_hf import TahoeX1ForPreTraining, TahoeX1Model
from tahoex1_hf.inference import prepared_layers, ragged
from tahoex1_hf.inference.prepared_layers import PreparedLayer
from tahoex1_hf.inference.ragged import ragged_forward
from tahoex1_hf.training.microbatches import microbatches

LENGTHS = (14, 14, 12, 9, 9, 6)


@pytest.fixture
def fake(flash_on_cpu: FlashStandIn) -> Iterator[None]:  # noqa: F811
    """Let tensors be without content."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def like(tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
    """Return a tensor of the same shape and type, without content."""
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def microbatch(style: str) -> tuple[TahoeX1ForPreTraining, dict[str, Any]]:
    """Return a model without content, and a microbatch as the trainer hands it over."""
    config = tiny_config(attention_mask_style=style)
    with _disable_current_modes():  # lengths and numbers of targets are read from the host's memory, before it is sent
        batch = packed(make_batch(config, LENGTHS))
        batch["labels"] = batch["labels"].masked_fill(~batch["target_mask"], -100.0)
        part = next(iter(microbatches(batch, 4)))
    sent = {name: like(value) if torch.is_tensor(value) else value for name, value in part.items()}
    return TahoeX1ForPreTraining(config).train(), {**sent, "num_items_in_batch": torch.ones(())}


def test_a_wait_is_found(fake: None) -> None:
    numbers = torch.ones(3)
    for work in (lambda: int(numbers.sum()), lambda: numbers.tolist(), lambda: bool(numbers.any())):
        with pytest.raises(DataDependentOutputException):
            work()
    for work in (lambda: numbers.nonzero(), lambda: numbers[numbers > 0], lambda: torch.unique(numbers)):
        with pytest.raises(DynamicOutputShapeException):
            work()


@pytest.mark.parametrize("style", ["full", "observed_or_self"])
def test_training(fake: None, style: str) -> None:
    model, part = microbatch(style)
    model(**part).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def test_without_the_collators_numbers_there_is_a_wait(fake: None) -> None:
    model, part = microbatch("observed_or_self")
    del part["num_targets"]
    with pytest.raises(DataDependentOutputException):
        model(**part)


@pytest.mark.parametrize("all_tokens", [True, False])
@pytest.mark.parametrize("prepared", [True, False])
def test_inference(fake: None, all_tokens: bool, prepared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    model = TahoeX1Model(config).eval()
    # Their weights are no parameters but fake tensors.
    monkeypatch.setattr(prepared_layers, "is_plain", lambda module: True)
    layers = [PreparedLayer.make(layer, torch.float16) for layer in model.layers] if prepared else None
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
    ids, values = (torch.empty(offsets[-1], dtype=kind) for kind in (torch.int64, torch.float32))
    # The values are read in the host's memory, and what is found there is sent.
    monkeypatch.setattr(ragged, "_distinct", lambda values: (values[:5], torch.zeros(len(values), dtype=torch.int64)))
    monkeypatch.setattr(ragged, "sent", like)
    pooled, hidden = ragged_forward(model, ids, values, offsets, all_tokens=all_tokens, prepared=layers)
    assert pooled.shape == (len(LENGTHS), config.hidden_size)
    assert (hidden is not None) == all_tokens
