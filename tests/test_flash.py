"""Test flash attention: its logic on a CPU, with a plain stand-in for the kernel, and the kernel itself on a GPU."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers.modeling_flash_attention_utils as flash_utils
from helpers import SHAPES, gradients, largest_difference, make_batch, packed, tiny_config, tiny_model
from transformers import PreTrainedModel

from tahoex1_hf import TahoeX1Config
from tahoex1_hf.inference.ragged import ragged_forward

CLOSE = 1e-5
FLASH_SHAPES = ["plain", "drugs", "gqa_glu_post_mean"]  # flash attention has no mask like that of the others


class PlainFlash:
    """The flash-attn package in plain torch, one sequence after the other; it records which function was used."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        return torch.einsum("hqk,khd->qhd", (torch.einsum("qhd,khd->hqk", q, k) * scale).softmax(-1), v)

    def flash_attn_func(self, q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        assert (dropout_p, causal) == (0.0, False)
        self.calls.append("dense")
        return torch.stack([self.attention(*cell, softmax_scale) for cell in zip(q, k, v, strict=True)])

    def flash_attn_varlen_func(
        self,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
    ):
        assert (dropout_p, causal) == (0.0, False)
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert int(cu_seqlens_q.diff().max()) == max_seqlen_q
        assert int(cu_seqlens_k.diff().max()) == max_seqlen_k
        assert (int(cu_seqlens_q[-1]), int(cu_seqlens_k[-1])) == (len(q), len(k))  # no padding is left
        self.calls.append("varlen")
        keys = cu_seqlens_k.diff().tolist()
        pieces = zip(q.split(cu_seqlens_q.diff().tolist()), k.split(keys), v.split(keys), strict=True)
        return torch.cat([self.attention(*cell, softmax_scale) for cell in pieces])


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlainFlash]:
    """Run transformers' own flash code (unpadding, packing, padding back) with the stand-in as its kernel."""
    kernel = PlainFlash()

    def lazy_imports(*args, **kwargs):
        functions = kernel.flash_attn_func, kernel.flash_attn_varlen_func, None
        return (*functions, flash_utils._pad_input, flash_utils._unpad_input)

    monkeypatch.setattr(flash_utils, "_lazy_imports", lazy_imports)
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
    yield kernel
    flash_utils._loaded_implementation = None


def flash_model(config: TahoeX1Config) -> PreTrainedModel:
    model = tiny_model(config)
    model.config._attn_implementation = "flash_attention_2"  # bypasses the check for a GPU
    assert model.tahoe.layers[0].self_attn.config._attn_implementation == "flash_attention_2"
    return model


@pytest.mark.parametrize("shape", FLASH_SHAPES)
def test_padded_equals_sdpa(flash: PlainFlash, shape: str) -> None:
    config = tiny_config(**SHAPES[shape])
    batch = make_batch(config)
    valid = batch["attention_mask"].bool()
    with torch.no_grad():
        expected, ours = tiny_model(config)(**batch), flash_model(config)(**batch)
    assert flash.calls == ["varlen"] * config.num_hidden_layers
    assert largest_difference(ours.pooler_output, expected.pooler_output) < CLOSE
    assert ours.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    for name in ("expression_predictions", "cell_expression_predictions"):
        assert largest_difference(ours[name][valid], expected[name][valid]) < CLOSE, name


@pytest.mark.parametrize("shape", FLASH_SHAPES)
def test_packed_equals_padded(flash: PlainFlash, shape: str) -> None:
    config = tiny_config(**SHAPES[shape])
    model, batch = flash_model(config), make_batch(config)
    with torch.no_grad():
        padded, ours = model(**batch), model(**packed(batch))
    assert flash.calls == ["varlen"] * 2 * config.num_hidden_layers
    assert largest_difference(ours.pooler_output, padded.pooler_output) < CLOSE
    assert ours.loss.item() == pytest.approx(padded.loss.item(), rel=1e-6)
    valid = batch["attention_mask"].bool()
    assert largest_difference(ours.expression_predictions[0], padded.expression_predictions[valid]) < CLOSE


@pytest.mark.parametrize("all_tokens", [False, True])
@pytest.mark.parametrize("shape", FLASH_SHAPES)
def test_inference_without_padding(flash: PlainFlash, shape: str, all_tokens: bool) -> None:
    config = tiny_config(**SHAPES[shape])
    batch = make_batch(config, targets=False)
    valid = batch["attention_mask"].bool()
    offsets = np.concatenate([[0], np.cumsum(valid.sum(1).numpy())])
    cells = batch["input_ids"][valid], batch["expression_values"][valid], offsets, batch.get("drug_ids"), all_tokens
    with torch.no_grad():
        expected = tiny_model(config).tahoe(**batch)
    pooled, hidden = ragged_forward(flash_model(config).tahoe, *cells)
    assert flash.calls == ["varlen"] * config.num_hidden_layers
    assert largest_difference(pooled, expected.pooler_output) < CLOSE
    if hidden is not None:
        assert largest_difference(hidden, expected.last_hidden_state[valid]) < CLOSE


def test_gradients_equal_those_of_sdpa(flash: PlainFlash) -> None:
    config = tiny_config()
    batch = make_batch(config)
    expected = gradients(tiny_model(config), [batch])
    for ours in (gradients(flash_model(config), [batch]), gradients(flash_model(config), [packed(batch)])):
        for name, gradient in expected.items():
            scale = max(gradient.abs().max().item(), 1e-2)
            assert largest_difference(ours[name], gradient) / scale < 2e-5, name


def test_nothing_is_padded(flash: PlainFlash) -> None:
    config = tiny_config()
    batch = make_batch(config, lengths=(10, 10))
    with torch.no_grad():
        expected, ours = tiny_model(config)(**batch), flash_model(config)(**batch)
    assert set(flash.calls) == {"dense"}
    assert largest_difference(ours.pooler_output, expected.pooler_output) < CLOSE


def test_mean_with_padding_equals_sdpa(flash: PlainFlash) -> None:
    config = tiny_config(cell_pooling="mean_with_padding")
    batch = make_batch(config)
    with torch.no_grad():
        expected, ours = tiny_model(config)(**batch), flash_model(config)(**batch)
    assert largest_difference(ours.pooler_output, expected.pooler_output) < CLOSE


def test_the_restricted_mask_is_refused_only_with_targets(flash: PlainFlash) -> None:
    config = tiny_config(attention_mask_style="observed_or_self")
    model, batch = flash_model(config), make_batch(config)
    for arguments in (batch, packed(batch)):
        with pytest.raises(ValueError, match=r"observed_or_self.*flash.*sdpa"):
            model(**arguments)
    assert flash.calls == []
    embedded = make_batch(config, targets=False)
    with torch.no_grad():
        expected, ours = tiny_model(config)(**embedded), model(**embedded)
    assert largest_difference(ours.pooler_output, expected.pooler_output) < CLOSE


@pytest.mark.parametrize("missing", ["cu_seq_lens_k", "max_length_q", "max_length_k"])
def test_packed_rows_need_every_argument(flash: PlainFlash, missing: str) -> None:
    # transformers would fall back to attention over the whole row, across the borders of cells.
    model, row = flash_model(tiny_config()), packed(make_batch(tiny_config()))
    del row[missing]
    with pytest.raises(ValueError, match=missing):
        model(**row)
    with torch.no_grad():
        tiny_model(tiny_config())(**row)  # sdpa needs cu_seq_lens_q alone


def gpu_model(config: TahoeX1Config, attention: str, dtype: torch.dtype) -> PreTrainedModel:
    model = tiny_model(config).to("cuda", dtype)
    model.set_attn_implementation(attention)
    return model


def on_gpu(arguments: dict) -> dict:
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash-attn is not installed")
@pytest.mark.parametrize("shape", FLASH_SHAPES)
def test_kernel_equals_sdpa(shape: str) -> None:
    config = tiny_config(**SHAPES[shape])
    batch = on_gpu(make_batch(config))
    row = on_gpu(packed(make_batch(config)))
    with torch.no_grad():
        expected = gpu_model(config, "sdpa", torch.bfloat16)(**batch)
        model = gpu_model(config, "flash_attention_2", torch.bfloat16)
        for ours in (model(**batch), model(**row)):
            assert ours.loss.item() == pytest.approx(expected.loss.item(), rel=2e-2)
            assert largest_difference(ours.pooler_output.float().cpu(), expected.pooler_output.float().cpu()) < 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_flex_backward_equals_sdpa(shape: str) -> None:
    config = tiny_config(hidden_size=64, **SHAPES[shape])
    batch = on_gpu(make_batch(config))
    expected = gradients(gpu_model(config, "sdpa", torch.float32), [batch])
    ours = gradients(gpu_model(config, "flex_attention", torch.float32), [batch])
    for name, gradient in expected.items():
        scale = max(gradient.abs().max().item(), 1e-2)
        assert largest_difference(ours[name].cpu(), gradient.cpu()) / scale < 1e-2, name


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_gpu_equals_cpu(shape: str) -> None:
    config = tiny_config(**SHAPES[shape])
    batch = make_batch(config)
    with torch.no_grad():
        expected = tiny_model(config)(**batch)
        ours = gpu_model(config, "sdpa", torch.float32)(**on_gpu(batch))
    assert largest_difference(ours.pooler_output.cpu(), expected.pooler_output) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("all_tokens", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_inference_without_padding_on_gpu(shape: str, all_tokens: bool) -> None:
    config = tiny_config(**SHAPES[shape])
    batch = make_batch(config, targets=False)
    valid = batch["attention_mask"].bool()
    offsets = np.concatenate([[0], np.cumsum(valid.sum(1).numpy())])
    drug_ids = batch["drug_ids"].cuda() if "drug_ids" in batch else None
    with torch.no_grad():
        expected = tiny_model(config).tahoe(**batch)
    model = gpu_model(config, "sdpa", torch.float32).tahoe
    ids, values = batch["input_ids"][valid].cuda(), batch["expression_values"][valid].cuda()
    pooled, hidden = ragged_forward(model, ids, values, offsets, drug_ids, all_tokens)
    assert largest_difference(pooled.cpu(), expected.pooler_output) < 1e-3
    if hidden is not None:
        assert largest_difference(hidden.cpu(), expected.last_hidden_state[valid]) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_gradients_on_gpu(shape: str) -> None:
    config = tiny_config(**SHAPES[shape])
    batch = make_batch(config)
    expected = gradients(tiny_model(config), [batch])
    ours = gradients(gpu_model(config, "sdpa", torch.float32), [on_gpu(packed(batch))])
    for name, gradient in expected.items():
        scale = max(gradient.abs().max().item(), 1e-2)
        assert largest_difference(ours[name].cpu(), gradient) / scale < 1e-2, name


# torch's own flash attention, which "sdpa" takes on packed rows ---------------------------------------

STYLES = ["full", "observed_or_self"]
LENGTHS = (70, 9, 133, 64, 2)
# Largest error in bfloat16, relative to the norm of the exact value: a few products in a row, each rounded to 2**-8.
BFLOAT16 = 6e-2


def gpu_config(style: str, **changes: Any) -> TahoeX1Config:
    return tiny_config(
        vocab_size=200, hidden_size=64, attention_mask_style=style, expression_encoder_dropout=0.0, **changes
    )


def norm_of_error(ours: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    pairs = [(ours[name].double().cpu() - value.double(), value.double()) for name, value in exact.items()]
    error, size = (sum(float(pair[i].square().sum()) for pair in pairs) ** 0.5 for i in (0, 1))
    return error / size if np.isfinite(error) else float("inf")


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["autocast", "weights in half precision"])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("lengths", [LENGTHS, (64, 64, 64)], ids=["ragged", "equal"])
def test_half_precision_on_gpu_equals_eager(style: str, lengths: tuple[int, ...], how: str) -> None:
    config = gpu_config(style)
    batch = make_batch(config, lengths)
    expected = gradients(tiny_model(config, attention="eager").double(), [batch])
    model = gpu_model(config, "sdpa", torch.bfloat16 if how != "autocast" else torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=how == "autocast"):
        ours = gradients(model, [on_gpu(packed(batch))])
    assert norm_of_error(ours, expected) < BFLOAT16


@pytest.mark.gpu
@pytest.mark.parametrize("style", STYLES)
def test_a_pass_on_gpu_waits_for_nothing(style: str) -> None:
    config = gpu_config(style)
    batch = make_batch(config, LENGTHS)
    model = gpu_model(config, "sdpa", torch.float32).train()
    row = on_gpu(packed(batch)) | {"num_targets": int(batch["target_mask"].sum())}
    for mode in ("default", "error"):  # the first pass compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                model(**row, num_items_in_batch=torch.ones((), device="cuda")).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("all_tokens", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_on_gpu_in_both_precisions(attention: str, dtype: torch.dtype, all_tokens: bool) -> None:
    """Also with flash attention chosen, which has no float32: evaluations in it must not fail."""
    if attention == "flash_attention_2" and dtype == torch.bfloat16 and not importlib.util.find_spec("flash_attn"):
        pytest.skip("flash-attn is not installed")
    config = gpu_config("full")
    batch = make_batch(config, LENGTHS, targets=False)
    valid = batch["attention_mask"].bool()
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
    with torch.no_grad():
        expected = tiny_model(config, attention="eager").tahoe(**batch)
    model = tiny_model(config).cuda().tahoe
    model.config._attn_implementation = attention
    ids, values = batch["input_ids"][valid].cuda(), batch["expression_values"][valid].cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype != torch.float32):
        pooled, hidden = ragged_forward(model, ids, values, offsets, None, all_tokens)
    limit = 1e-4 if dtype == torch.float32 else BFLOAT16
    assert norm_of_error({"pooled": pooled}, {"pooled": expected.pooler_output}) < limit
    if hidden is not None:
        assert norm_of_error({"hidden": hidden}, {"hidden": expected.last_hidden_state[valid]}) < limit
