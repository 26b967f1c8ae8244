"""Digests keep their values, since they identify unfinished runs and adapters on disk."""

import copy
from types import SimpleNamespace

import pytest
import torch

from tahoex1_hf.common.digests import (
    json_digest,
    some_weights_digest,
    tokenizer_digest,
    vocabulary_digest,
    weights_digest,
)

VOCABULARY = {"<pad>": 0, "<cls>": 1, "ENSG00000000003": 2}


def tokenizer(**changes: object) -> SimpleNamespace:
    settings = {
        "value_encoding": "bins",
        "num_bins": 51,
        "right_binning": False,
        "target_sum": 1e4,
        "context_length": 16,
        "overflow": "sample",
        "pad_value": -2,
        "drug_to_id": None,
        "first_gene_raw": False,
    }
    special = {"cls_token": "<cls>", "pad_token": "<pad>"}
    return SimpleNamespace(get_vocab=lambda: VOCABULARY, **special, **{**settings, **changes})


def test_digests_are_those_of_the_first_release() -> None:
    layer = torch.nn.Linear(100, 50)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(5000.0).view(50, 100) / 64)
        layer.bias.fill_(0.5)
    found = [
        json_digest({"b": [1, "é"], "a": None}),
        vocabulary_digest(tokenizer()),
        tokenizer_digest(tokenizer()),
        some_weights_digest(layer),
    ]
    assert found == [
        "1c3d52eb78675f43aa6a9ba74757059995a46043fee52c606fce62df3de0a8de",
        "9dee7a55ef3028418b2b2fe7348c9558c2991e3646d8b0f47e50cc1f55824e7b",
        "fe646541ea6084ce0620245f6c40baee774d6ac440ef92591646ba36fba11fa9",
        "a227ab5d1b431519d5c9ba8773c2c1b650784290232ff99a6f221842debad9c7",
    ]


def test_every_setting_of_the_encoding_changes_the_digest() -> None:
    changes = [{}, {"num_bins": 52}, {"context_length": None}, {"overflow": "first"}, {"drug_to_id": {"<pad>": 0}}]
    assert len({tokenizer_digest(tokenizer(**change)) for change in changes}) == len(changes)
    assert vocabulary_digest(tokenizer(num_bins=52)) == vocabulary_digest(tokenizer())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_value_of_every_tensor_changes_the_digest(dtype: torch.dtype) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(70, 60), torch.nn.BatchNorm1d(60), torch.nn.Linear(60, 1)).to(dtype)
    model.register_buffer("turned", torch.arange(6.0, dtype=dtype).view(2, 3).T, persistent=False)
    seen = {weights_digest(model)}
    assert weights_digest(copy.deepcopy(model)) in seen
    tensors = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
    for tensor in tensors:
        last = tensor[tuple(size - 1 for size in tensor.shape)]
        last += 1
        seen.add(weights_digest(model))
        last -= 1
    assert len(seen) == len(tensors) + 1
    before = some_weights_digest(model)
    model[0].weight.data[0, 3] += 1
    assert some_weights_digest(model) == before
    assert weights_digest(model) not in seen
    assert weights_digest(torch.nn.Linear(3, 2, bias=False)) != weights_digest(torch.nn.Linear(2, 3, bias=False))
