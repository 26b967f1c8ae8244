"""Attention by a compiled C program: beside torch's, the same bits however cells are put together, or not used."""

import ctypes
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cells import NUM_GENES, make_cells, write_cells, write_vocab
from helpers import tiny_config, tiny_model
from torch.nn.functional import scaled_dot_product_attention

from tahoex1_hf import TahoeX1Model, TahoeX1Tokenizer
from tahoex1_hf.embedding.files import embed_files
from tahoex1_hf.embedding.shards import ShardFolder
from tahoex1_hf.inference import compiled_attention as program
from tahoex1_hf.inference import encoder as encoding
from tahoex1_hf.inference.compiled_attention import SWITCH, CompiledAttention, compiled_attention
from tahoex1_hf.inference.encoder import CellEncoder


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    """Have a process that has not looked for the program."""
    program._loaded.cache_clear()
    yield
    program._loaded.cache_clear()


@pytest.fixture
def attention() -> CompiledAttention:
    """Return the program, or skip the test with the reason."""
    found = compiled_attention()
    if found is None:
        pytest.skip(
            "attention is not compiled: it needs matrix tiles (AMX), a C compiler, and no variable against them"
        )
    return found


def projected(tokens: int, heads: int, key_heads: int, width: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return (1.5 * torch.randn(tokens, (heads + 2 * key_heads) * width, generator=random)).bfloat16()


def by_torch(states: torch.Tensor, lengths: list[int], heads: int, key_heads: int, width: int) -> torch.Tensor:
    """Attend in float32, cell by cell."""
    cells = []
    for cell in states.float().split(lengths):
        parts = cell.unflatten(1, (-1, width)).transpose(0, 1).unsqueeze(0).split([heads, key_heads, key_heads], dim=1)
        query, key, value = parts
        groups = heads // key_heads
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        cells.append(scaled_dot_product_attention(query, key, value)[0].transpose(0, 1).flatten(1))
    return torch.cat(cells)


def bounds(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *np.cumsum(lengths)])


# The program itself -------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[1], [2, 31, 32, 33, 64, 65], [127, 1, 700, 0, 513]])
@pytest.mark.parametrize(
    ("heads", "key_heads", "width"), [(8, 8, 64), (4, 2, 32), (2, 2, 128), (3, 1, 96), (1, 1, 256)]
)
def test_results_are_torchs(
    attention: CompiledAttention, heads: int, key_heads: int, width: int, lengths: list[int]
) -> None:
    states = projected(sum(lengths), heads, key_heads, width)
    ours = attention(states, bounds(lengths), heads, key_heads, width**-0.5).float()
    exact = by_torch(states, [length for length in lengths if length], heads, key_heads, width)
    # The weights and the result are rounded to 8 bits: 2^-9 of each at most, half of that on average.
    assert float((ours - exact).norm() / exact.norm()) < 2**-8


def test_sharp_attention_takes_the_largest(attention: CompiledAttention) -> None:
    states = projected(300, 1, 1, 64)
    ours = attention(states, bounds([300]), 1, 1, 50.0).float()
    query, key, value = states.float().split(64, dim=1)
    weights = (query @ key.t() * 50).softmax(-1)
    assert torch.isfinite(ours).all()
    assert float((ours - weights @ value).norm() / value.norm()) < 2**-8


def test_a_cell_depends_on_nothing_but_itself(attention: CompiledAttention) -> None:
    lengths, states = [70, 9, 133, 400, 2], projected(614, 4, 4, 64)
    together = attention(states, bounds(lengths), 4, 4, 0.125).split(lengths)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for cell, whole in zip(states.split(lengths), together, strict=True):
                assert torch.equal(attention(cell, bounds([len(cell)]), 4, 4, 0.125), whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_in_its_cell_alone(attention: CompiledAttention, value: float) -> None:
    states = projected(100, 2, 2, 64)
    states[40, 7] = value
    finite = attention(states, bounds([30, 50, 20]), 2, 2, 0.125).isfinite().all(1)
    assert not finite[40]
    assert finite[:30].all()
    assert finite[80:].all()


def test_arguments_that_do_not_fit_are_refused(attention: CompiledAttention) -> None:
    states = projected(10, 2, 2, 64)
    for wrong, where, heads in (
        (states.float(), [0, 10], 2),
        (states, [0, 11], 2),
        (states, [0, 6, 4, 10], 2),
        (states, [0, 10], 7),
    ):
        with pytest.raises(ValueError, match=r"tokens|heads"):
            attention(wrong, torch.tensor(where), heads, heads, 0.125)


# Where it is used ---------------------------------------------------------------------------------


class Plain(CompiledAttention):
    """Stands for the program on any CPU; it counts its calls."""

    calls = 0

    def __call__(
        self, states: torch.Tensor, boundaries: torch.Tensor, heads: int, key_heads: int, scaling: float
    ) -> Any:
        Plain.calls += 1
        width = states.shape[1] // (heads + 2 * key_heads)
        return by_torch(states, boundaries.diff().tolist(), heads, key_heads, width).to(states.dtype)


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have compiled attention, and packed weights, on any CPU."""
    Plain.calls = 0
    monkeypatch.setattr(encoding, "compiled_attention", lambda: Plain(ctypes.CDLL(None)))
    monkeypatch.setattr(encoding, "packs_weights", lambda dtype: dtype == torch.bfloat16)
    monkeypatch.delenv(SWITCH, raising=False)


def encoder_of(tokens: Any, dtype: str = "bfloat16", **settings: Any) -> CellEncoder:
    shape = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 3}
    torch.manual_seed(0)
    model = TahoeX1Model(tiny_config(**shape, **settings)).eval()
    return CellEncoder(model, tokens, device="cpu", dtype=dtype)


class Tokens(list):
    """As much of a tokenizer as an encoder asks for."""

    pad_token_id, pad_value = 0, -2.0


def test_an_encoder_says_what_attends(everywhere: None) -> None:
    tokens = Tokens(range(tiny_config().vocab_size))
    assert encoder_of(tokens).attention == "compiled"
    assert encoder_of(tokens, dtype="float32").attention == "sdpa"
    assert encoder_of(tokens, attn_implementation="eager").attention == "eager"
    encoder = encoder_of(tokens)
    encoder.go_on_as(None)
    assert encoder.attention == "compiled"
    encoder.go_on_as({"dtype": "bfloat16"})
    assert (encoder.attention, encoder._kept_layers.attention) == ("sdpa", None)


def test_a_run_goes_on_with_the_attention_it_began_with(
    everywhere: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3, "vocab_size": NUM_GENES + 3}
    model, tokenizer = tiny_model(tiny_config(**shape), TahoeX1Model), TahoeX1Tokenizer(str(write_vocab(tmp_path)))
    cells, output = write_cells(make_cells(20), tmp_path / "cells", "csr"), tmp_path / "cells.npy"
    claimed: list[dict[str, Any]] = []
    claim = ShardFolder.claim

    def note(self: ShardFolder, identity: dict[str, Any], *rest: Any) -> None:
        claim(self, identity, *rest)
        claimed.append(identity)

    def embed(begun: dict[str, Any] | None) -> tuple[bool, int]:
        """Embed, after a run with this record was begun; return whether with the program, and its number of calls."""
        output.unlink(missing_ok=True)
        if begun is not None:
            ShardFolder(f"{output}.shards").write_file("run.json", json.dumps(begun).encode())
        Plain.calls = 0
        embed_files(cells, output, model, tokenizer, device="cpu", dtype="bfloat16", progress=False)
        return claimed[-1]["compiled_attention"], Plain.calls

    monkeypatch.setattr(ShardFolder, "claim", note)
    assert embed(None) == (True, 2)  # of three layers, the last computes <cls> alone
    record = claimed[0]
    assert embed(record) == (True, 2)
    assert embed(record | {"compiled_attention": False}) == (False, 0)
    del record["compiled_attention"]  # as an earlier version's
    assert embed(record) == (False, 0)
    monkeypatch.setattr(encoding, "compiled_attention", lambda: None)
    with pytest.raises(ValueError, match="compiled_attention"):
        embed(record | {"compiled_attention": True})


# Where it is not ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"), [(SWITCH, "0"), ("ATEN_CPU_CAPABILITY", "avx2"), ("ONEDNN_MAX_CPU_ISA", "AVX2")]
)
def test_variables_switch_it_off(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "_loaded", lambda: Plain(ctypes.CDLL(None)))
    for other in (SWITCH, *program._LIMITS):
        monkeypatch.delenv(other, raising=False)
    assert compiled_attention() is not None
    monkeypatch.setenv(name, value)
    assert compiled_attention() is None


@pytest.mark.parametrize("lacking", ["instructions", "compiler", "folder", "agreement"])
def test_torch_attends_where_something_is_missing(
    lacking: str, attention: CompiledAttention, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program._loaded.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if lacking == "instructions":
        monkeypatch.setattr(program, "_INSTRUCTIONS", {"no_such_instruction": ""})
    elif lacking == "compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
    elif lacking == "folder":
        (tmp_path / "cache").write_text("a file")
    else:
        monkeypatch.setattr(program, "_TOLERANCE", 0.0)
    assert compiled_attention() is None


def test_the_program_is_compiled_once(
    attention: CompiledAttention, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program._loaded.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiled_attention() is not None
    program._loaded.cache_clear()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it is compiled again"))
    assert compiled_attention() is not None
    (library,) = (tmp_path / "tahoex1_hf").iterdir()
    assert library.suffix == ".so"
