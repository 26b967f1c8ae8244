"""Attention by a compiled C program: beside torch's, the same bits however cells are put together, or not used."""

import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cells import NUM_GENES, make_cells, write_cells, write_vocab
from encoder_parts import Plain, Tokens, by_torch, plain
from helpers import tiny_config, tiny_model
from torch.profiler import ProfilerActivity, profile

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


EVERY_PROGRAM = {dtype: list(programs) for dtype, programs in program._PROGRAMS.items()}
# The programs: the number of each among those of its type.
PROGRAMS = [(torch.bfloat16, 0), (torch.float32, 0), (torch.float32, 1)]


@pytest.fixture(params=PROGRAMS, ids=["bfloat16", "float32-avx512", "float32-avx2"])
def attention(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CompiledAttention:
    """Return a program, or skip the test with the reason."""
    dtype, number = request.param
    monkeypatch.setitem(program._PROGRAMS, dtype, [program._PROGRAMS[dtype][number]])
    found = compiled_attention(dtype)
    if found is None:
        needed = ", ".join(program._PROGRAMS[dtype][0].instructions)
        pytest.skip(f"attention is not compiled: it needs Linux, {needed}, a C compiler, and no variable against them")
    return found


# Errors by type, relative to the norm. In bfloat16 the weights and the result are rounded to 8 bits: 2^-9 of each at
# most, half of that on average. In float32 sums of 256 products and 700 weights are rounded at each step, by 2^-24 at
# most; random errors add up to their square roots, 1e-6 and 1.6e-6 (measured: up to 1.3e-6, torch's own 1.26e-6).
ERRORS = {torch.bfloat16: 2**-8, torch.float32: 2e-6}


def projected(
    tokens: int, heads: int, key_heads: int, width: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return (1.5 * torch.randn(tokens, (heads + 2 * key_heads) * width, generator=random)).to(dtype)


def bounds(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *np.cumsum(lengths)])


# The program itself -------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[1], [2, 11, 13, 31, 32, 33, 64, 65], [127, 1, 700, 0, 513]])
@pytest.mark.parametrize(
    ("heads", "key_heads", "width"), [(8, 8, 64), (4, 2, 32), (2, 2, 128), (3, 1, 96), (1, 1, 256)]
)
def test_results_are_torchs(
    attention: CompiledAttention, heads: int, key_heads: int, width: int, lengths: list[int]
) -> None:
    states = projected(sum(lengths), heads, key_heads, width, attention.dtype)
    ours = attention(states, bounds(lengths), heads, key_heads, width**-0.5)
    exact = by_torch(states, [length for length in lengths if length], heads, key_heads, width**-0.5)
    assert ours.dtype == attention.dtype
    assert float((ours - exact).norm() / exact.norm()) < ERRORS[attention.dtype]


@pytest.mark.parametrize("tokens", [300, 1500])
def test_sharp_attention_takes_the_largest(attention: CompiledAttention, tokens: int) -> None:
    states = projected(tokens, 1, 1, 64, attention.dtype)
    ours = attention(states, bounds([tokens]), 1, 1, 50.0)
    query, key, value = states.double().split(64, dim=1)
    weights = (query @ key.t() * 50).softmax(-1)
    assert torch.isfinite(ours).all()
    # Scores are up to 10^4: in float32 they, and so the weights, have an error of 10^-3 where two are nearly the same.
    assert float((ours - weights @ value).norm() / value.norm()) < 2**-8


def test_the_largest_score_may_come_late(attention: CompiledAttention) -> None:
    # Keys are read in parts; a larger score in a later part makes what was seen before count less.
    random = torch.Generator().manual_seed(0)
    states = torch.randn(1300, 3 * 64, generator=random)
    states[:, 64:128] *= torch.linspace(0, 6, 1300).unsqueeze(1)
    states = states.to(attention.dtype)
    ours, exact = attention(states, bounds([1300]), 1, 1, 0.125), by_torch(states, [1300], 1, 1, 0.125)
    assert float((ours - exact).norm() / exact.norm()) < ERRORS[attention.dtype]


def test_both_programs_in_float32_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    states, outputs = projected(1400, 2, 1, 64, torch.float32), []
    for each in EVERY_PROGRAM[torch.float32]:
        program._loaded.cache_clear()
        monkeypatch.setitem(program._PROGRAMS, torch.float32, [each])
        attention = compiled_attention(torch.float32)
        if attention is None:
            pytest.skip("not both are compiled: they need Linux, AVX-512 and AVX2, and a C compiler")
        outputs.append(attention(states, bounds([700, 13, 0, 687]), 2, 1, 0.125))
    assert torch.equal(*outputs)


def test_the_result_is_written_where_it_is_asked_for(attention: CompiledAttention) -> None:
    states = projected(50, 2, 2, 64, attention.dtype)
    out = torch.full((50, 128), 7.0, dtype=attention.dtype)
    assert attention(states, bounds([20, 30]), 2, 2, 0.125, out) is out
    assert torch.equal(out, attention(states, bounds([20, 30]), 2, 2, 0.125))
    for wrong in (out[:49], out.double(), torch.empty(128, 50, dtype=attention.dtype).t()):
        with pytest.raises(ValueError, match="out must be"):
            attention(states, bounds([20, 30]), 2, 2, 0.125, wrong)


def test_a_cell_depends_on_nothing_but_itself(attention: CompiledAttention) -> None:
    lengths, states = [70, 9, 133, 600, 2], projected(814, 4, 4, 64, attention.dtype)
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
    states = projected(100, 2, 2, 64, attention.dtype)
    states[40, 7] = value
    finite = attention(states, bounds([30, 50, 20]), 2, 2, 0.125).isfinite().all(1)
    assert not finite[40]
    assert finite[:30].all()
    assert finite[80:].all()


def test_a_bias_is_added_in_float32(attention: CompiledAttention) -> None:
    states, lengths = projected(363, 4, 2, 64, attention.dtype), [350, 13]
    bias = torch.randn(8 * 64, generator=torch.Generator().manual_seed(1))
    if attention.dtype != torch.float32:
        with pytest.raises(ValueError, match="float32"):
            attention(states, bounds(lengths), 4, 2, 0.125, bias=bias)
        return
    ours, exact = (
        attention(states, bounds(lengths), 4, 2, 0.125, bias=bias),
        by_torch(states + bias, lengths, 4, 2, 0.125),
    )
    assert float((ours - exact).norm() / exact.norm()) < ERRORS[attention.dtype]
    for wrong in (bias[1:], bias.double()):
        with pytest.raises(ValueError, match="bias must be"):
            attention(states, bounds(lengths), 4, 2, 0.125, bias=wrong)


def test_a_profile_shows_it(attention: CompiledAttention) -> None:
    states = projected(50, 2, 2, 64, attention.dtype)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as run:
        attention(states, bounds([50]), 2, 2, 0.125)
    (event,) = (event for event in run.key_averages() if event.key == program.NAME)
    assert event.count == 1


def test_arguments_that_do_not_fit_are_refused(attention: CompiledAttention) -> None:
    states = projected(10, 2, 2, 64, attention.dtype)
    for wrong, where, heads in (
        (states.double(), [0, 10], 2),
        (states, [0, 11], 2),
        (states, [0, 6, 4, 10], 2),
        (states, [0, 10], 7),
    ):
        with pytest.raises(ValueError, match=r"tokens|heads"):
            attention(wrong, torch.tensor(where), heads, heads, 0.125)


# Where it is used ---------------------------------------------------------------------------------


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have compiled attention, and packed weights, on any CPU."""
    Plain.calls = 0
    monkeypatch.setattr(encoding, "compiled_attention", plain)
    monkeypatch.setattr(encoding, "packs_weights", lambda dtype: dtype == torch.bfloat16)
    monkeypatch.delenv(SWITCH, raising=False)


def encoder_of(tokens: Any, dtype: str = "bfloat16", **settings: Any) -> CellEncoder:
    shape = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 3}
    torch.manual_seed(0)
    model = TahoeX1Model(tiny_config(**shape, **settings)).eval()
    return CellEncoder(model, tokens, device="cpu", dtype=dtype)


def test_an_encoder_says_what_attends(everywhere: None) -> None:
    tokens = Tokens(tiny_config().vocab_size)
    assert encoder_of(tokens).attention == "compiled"
    assert encoder_of(tokens, dtype="float32").attention == "compiled"
    assert encoder_of(tokens, attn_implementation="eager").attention == "eager"
    encoder = encoder_of(tokens)
    encoder.go_on_as(None)
    assert encoder.attention == "compiled"
    encoder.go_on_as({"dtype": "bfloat16"})
    assert (encoder.attention, encoder._kept_layers.attention) == ("sdpa", None)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_run_goes_on_with_the_attention_it_began_with(
    everywhere: None, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
        embed_files(cells, output, model, tokenizer, device="cpu", dtype=dtype, progress=False)
        return claimed[-1]["compiled_attention"], Plain.calls

    monkeypatch.setattr(ShardFolder, "claim", note)
    assert embed(None) == (True, 2)  # of three layers, the last computes <cls> alone
    record = claimed[0]
    assert embed(record) == (True, 2)
    assert embed(record | {"compiled_attention": False}) == (False, 0)
    del record["compiled_attention"]  # as an earlier version's
    assert embed(record) == (False, 0)
    monkeypatch.setattr(encoding, "compiled_attention", lambda dtype: None)
    with pytest.raises(ValueError, match="compiled_attention"):
        embed(record | {"compiled_attention": True})


# Where it is not ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"), [(SWITCH, "0"), ("ATEN_CPU_CAPABILITY", "avx2"), ("ONEDNN_MAX_CPU_ISA", "AVX2")]
)
def test_variables_switch_it_off(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "_loaded", plain)
    for other in (SWITCH, *program._LIMITS):
        monkeypatch.delenv(other, raising=False)
    assert compiled_attention(torch.float32) is not None
    monkeypatch.setenv(name, value)
    assert compiled_attention(torch.float32) is None


def test_types_that_no_program_computes_with_are_torchs() -> None:
    assert compiled_attention(torch.float16) is None


def test_a_processor_with_avx2_alone_has_the_program_for_it(
    attention: CompiledAttention, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if attention.dtype != torch.float32:
        pytest.skip("there is no program for bfloat16 without matrix tiles")
    program._loaded.cache_clear()
    monkeypatch.setitem(program._PROGRAMS, torch.float32, EVERY_PROGRAM[torch.float32])
    monkeypatch.setattr(program, "_instructions", lambda: {"avx2", "fma", "sse4_2"})
    chosen: list[Any] = []
    monkeypatch.setattr(program, "_compiled", lambda each: chosen.append(each) or tmp_path / "none")
    assert compiled_attention(torch.float32) is None
    assert set(chosen[0].instructions) == {"avx2", "fma"}


@pytest.mark.parametrize("lacking", ["instructions", "compiler", "folder", "agreement"])
def test_torch_attends_where_something_is_missing(
    lacking: str, attention: CompiledAttention, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program._loaded.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if lacking == "instructions":
        monkeypatch.setattr(program, "_instructions", set)
    elif lacking == "compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
    elif lacking == "folder":
        (tmp_path / "cache").write_text("a file")
    else:
        (only,) = program._PROGRAMS[attention.dtype]
        monkeypatch.setitem(program._PROGRAMS, attention.dtype, [replace(only, tolerance=0.0)])
    assert compiled_attention(attention.dtype) is None


def test_the_program_is_compiled_once(
    attention: CompiledAttention, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program._loaded.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiled_attention(attention.dtype) is not None
    program._loaded.cache_clear()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it is compiled again"))
    assert compiled_attention(attention.dtype) is not None
    (library,) = (tmp_path / "tahoex1_hf").iterdir()
    assert library.suffix == ".so"
