"""Setting up CUDA beside other work; that it happens at all needs a GPU."""

import threading
from typing import Any

import pytest
import torch

from tahoex1_hf.common import cuda_start
from tahoex1_hf.common.cuda_start import start_cuda


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Devices that a thread was begun for, on a machine that seems to have a GPU."""
    devices: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda_start, "_set_up", devices.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    return devices


@pytest.mark.parametrize(("device", "wanted"), [(None, "cuda"), ("cuda", "cuda"), ("cuda:1", "cuda:1")])
def test_the_gpu_that_will_be_used_is_set_up(asked: list[str], device: str | None, wanted: str) -> None:
    thread = start_cuda(device)
    assert isinstance(thread, threading.Thread)
    thread.join()
    assert asked == [wanted]


def test_nothing_is_set_up_for_other_devices_and_under_launchers(
    asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert start_cuda("cpu") is None
    assert start_cuda("mps") is None
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert start_cuda(None) is None
    assert asked == []


def test_nothing_is_set_up_without_a_gpu(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert start_cuda(None) is None


def test_a_failure_is_left_to_those_who_use_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no GPU after all")

    monkeypatch.setattr(torch, "ones", fail)
    cuda_start._set_up("cuda")


@pytest.mark.gpu
def test_a_gpu_is_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    thread = start_cuda(None)
    assert thread is not None
    thread.join()
    assert torch.cuda.is_initialized()
