"""Memory of a GPU: our setting is made in time, and somebody else's stays."""

import os

import pytest
import torch

from tahoex1_hf.common.cuda_memory import let_segments_grow


@pytest.fixture
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)


def test_segments_grow_unless_somebody_said_otherwise(no_settings: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    let_segments_grow()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
        monkeypatch.setenv(name, "max_split_size_mb:64")
        let_segments_grow()
        assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64") == "max_split_size_mb:64"
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")


def test_it_is_too_late_once_cuda_is_in_use(no_settings: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    let_segments_grow()
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
