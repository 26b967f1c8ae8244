"""The device of a model is chosen and checked."""

import pytest
import torch

from tahoex1_hf.inference.encoder import choose_device


def test_an_existing_device_is_taken() -> None:
    assert choose_device("cpu") == choose_device(torch.device("cpu")) == torch.device("cpu")
    assert choose_device().type in ("cpu", "cuda", "mps")


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda")])
def test_cuda_without_a_gpu(device: str | torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device='cuda.* cannot be used, .*: pass cpu, or leave the device out"):
        choose_device(device)


def test_a_gpu_with_a_number_that_is_too_high(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="device='cuda:2' is not there, only 2 CUDA GPUs are"):
        choose_device("cuda:2")


def test_mps_without_an_apple_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="there is no Apple GPU here"):
        choose_device("mps")


def test_a_device_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="device='gpu' is not one that PyTorch knows: pass cuda, mps or cpu"):
        choose_device("gpu")
