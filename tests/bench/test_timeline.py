"""bench.timeline without a GPU: what it makes of a profiler's trace. Failures caught: a layer cut elsewhere than at its
attention, two kernels of one name taken for one, a token's end taken for a layer, a kernel of few layers in the table,
a trace in which another kernel is the attention told as no error."""

from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

from bench import timeline
from bench.timeline import find_layers, parse_trace, summarize

LAYERS, TOKENS = 4, 3
ATTEND = "void kvtc::(anonymous namespace)::decode_cells_sm90_few<128, 8, true, false>(kvtc::attn_args, float*)"
PRODUCT = "void mul_mat_vec_q<(ggml_type)2, 1>(void const*, void const*, int)"
WRITE = "void kvtc::(anonymous namespace)::transform_and_write_all<1, false>(kvtc::fused_args)"


def trace() -> list[dict]:
    """Layers of 100 µs: attention, the write beside it, two products; after a token's last one 300 µs of others."""
    events, now = [{"cat": "cpu_op", "name": "decode_cells", "ts": 0, "dur": 9}], 1000.0

    def add(name: str, at: float, us: float, stream: int = 7, grid: tuple[int, ...] = (132, 1, 1)) -> None:
        args = {"stream": stream, "grid": list(grid)}
        events.append({"cat": "kernel", "name": name, "ts": now + at, "dur": us, "args": args})

    for token in range(TOKENS):
        for layer in range(LAYERS):
            add(ATTEND, 0, 60 + layer)
            add(WRITE, 2, 20, stream=14, grid=(4, 1, 2))
            add(PRODUCT, 65, 10, grid=(3584, 1, 1))
            add(PRODUCT, 80, 15, grid=(3584, 1, 1))
            if layer == 0 and token == 0:
                add("once", 70, 1)
            now += 100
        add("logits", 0, 290)
        now += 300
    return events[::-1]


def test_a_layer_is_from_attention_to_attention_without_a_tokens_end():
    layers = find_layers(parse_trace(trace()))
    assert len(layers) == TOKENS * (LAYERS - 1)
    assert all(layer[0].name.startswith("decode_cells_sm90_few") for layer in layers)
    assert {len(layer) for layer in layers} == {4, 5}


def test_kernels_of_one_name_are_told_apart_and_rare_ones_left_out():
    steps = summarize(find_layers(parse_trace(trace())))
    assert [(step.name.split("<")[0], step.stream) for step in steps] == [
        ("decode_cells_sm90_few", 7),
        ("transform_and_write_all", 14),
        ("mul_mat_vec_q", 7),
        ("mul_mat_vec_q", 7),
    ]
    assert [(step.start, step.end) for step in steps] == [(0, 61), (2, 22), (65, 75), (80, 95)]
    assert steps[0].grid == "132x1x1" and steps[1].grid == "4x1x2"


def test_names_are_without_namespaces_and_arguments():
    names = {kernel.name for kernel in parse_trace(trace())}
    assert {"decode_cells_sm90_few<128, 8, true, false>", "mul_mat_vec_q<2, 1>"} < names


def test_a_trace_without_attention_says_so():
    with pytest.raises(ValueError, match="no two kernels are an attention"):
        find_layers(parse_trace(trace()), "flash_attn")


def test_no_gpu_is_one_line(tmp_path, monkeypatch):
    def record(*_: object) -> None:
        raise RuntimeError("torch finds no GPU")

    monkeypatch.setattr(timeline, "record", record)
    (tmp_path / "model.gguf").write_bytes(b"")
    app = typer.Typer()
    app.command()(timeline.main)
    result = CliRunner().invoke(app, [str(tmp_path / "model.gguf")])
    assert result.exit_code == 1 and result.stderr == "kvtc: torch finds no GPU\n"
