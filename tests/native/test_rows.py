"""The entropy coder in C beside its numpy twin. Failures caught: a byte of a block or of a model that differs, rows
that do not come back with vectors or without, a model fitted so badly that rows grow, damage that C reads where numpy
refuses it."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import row_models
import synthetic
from ffi import Native, base, ffi
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from kvtc_gguf.layout import FormatError
from kvtc_gguf.native.rows import RowCodec
from kvtc_gguf.reference import encode_rows
from kvtc_gguf.reference_rows import CODE, HALF, ZERO, RowModel, Run, uniform

SEEDS = st.integers(0, 2**32 - 1)


def c_bytes(data: bytes | np.ndarray):
    return ffi.from_buffer("uint8_t[]", data)


def unless_refused(run):
    try:
        return run()
    except FormatError:
        return None


@settings(max_examples=30, deadline=None)
@given(row_models.runs(), st.integers(1, 70), SEEDS)
@example([Run(2, CODE, 8), Run(16, HALF, 1)], 1, 5)  # two codes of the index are as short
def test_blocks_and_models_are_the_twins(runs, n, seed):
    twin = row_models.model(runs, seed)
    rows = row_models.rows(twin, n, seed)
    model = RowCodec.read(twin.to_bytes())
    assert model.to_bytes() == twin.to_bytes() and model.row_bytes == twin.row_bytes
    block = model.encode(rows)
    assert block == twin.encode(rows)
    np.testing.assert_array_equal(model.decode(block, n), rows)


@pytest.fixture(params=[True, False], ids=["vectors", "plain"])
def vectors(request, monkeypatch):
    """Whether decoding may use the processor's vectors."""
    if not request.param:
        monkeypatch.setenv("GGML_KVTC_NO_VECTORS", "1")
    return request.param


@pytest.mark.parametrize("n", [31, 32, 64, 1024, 1500])
def test_all_widths_come_back_with_and_without_vectors(vectors, n):
    """Whole units and what is left of a run, rows of whole and of broken steps, a column of one value."""
    runs = [Run(8, CODE, 1), *(Run(w, CODE, c) for w in (6, 5, 4, 3, 2, 1) for c in (8, 80)), Run(16, HALF, 9)]
    twin = row_models.model([*runs, Run(8, ZERO, 3), Run(8, CODE, 1)], n)
    twin.levels[8][0] = [0] * 77 + [9] + [0] * 178
    twin.index[-1] = 0
    rows = row_models.rows(twin, n, n)
    model = RowCodec.read(twin.to_bytes())
    np.testing.assert_array_equal(model.decode(model.encode(rows), n), rows)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row_models.runs(), SEEDS, st.data())
def test_damage_is_judged_as_by_the_twin(vectors, runs, seed, data):
    twin = row_models.model(runs, seed)
    rows = row_models.rows(twin, 20, seed)
    block = bytearray(twin.encode(rows))
    block[data.draw(st.integers(0, len(block) - 1))] ^= data.draw(st.integers(1, 255))
    del block[data.draw(st.one_of(st.just(len(block)), st.integers(0, len(block)))) :]
    expected = unless_refused(lambda: twin.decode(bytes(block), 20))
    got = unless_refused(lambda: RowCodec.read(twin.to_bytes()).decode(bytes(block), 20))
    assert (got is None) == (expected is None)
    assert got is None or np.array_equal(got, expected)
    raw = bytearray(twin.to_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    expected_bytes = unless_refused(lambda: RowModel.from_bytes(bytes(raw)).to_bytes())
    assert unless_refused(lambda: RowCodec.read(bytes(raw)).to_bytes()) == expected_bytes


@pytest.mark.parametrize("n", [1, 7, 196, 1024, 5000])
def test_fitted_models_code_what_they_were_fitted_to(n):
    """Codes of one cache row and f16 values of all scales; more rows than the sample that is counted."""
    rng = np.random.default_rng(n)
    codes = uniform([Run(8, CODE, 1), Run(4, CODE, 16), Run(2, CODE, 32), Run(1, CODE, 8)])
    rows = row_models.rows(codes, n, n)
    nibbles = np.clip(rng.normal(7.5, 2, (n, 16)), 0, 15).astype(np.uint8)
    rows[:, 1:9] = nibbles[:, ::2] | nibbles[:, 1::2] << 4
    halves = (rng.standard_normal((n, 40)) * np.exp2(rng.integers(-9, 9, 40))).astype("<f2").view(np.uint8)
    for runs, own in ((codes.runs, rows), ([Run(16, HALF, 40)], halves.reshape(n, -1))):
        own = np.ascontiguousarray(own)
        model = RowCodec.fit(runs, own)
        block = model.encode(own)
        assert block is not None
        np.testing.assert_array_equal(model.decode(block, n), own)
        np.testing.assert_array_equal(RowModel.from_bytes(model.to_bytes()).decode(block, n) if n < 200 else own, own)
        if n >= 1024:
            assert len(block) + len(model.to_bytes()) < 0.95 * own.nbytes


def test_runs_of_cache_rows_are_where_codes_are(tmp_path):
    """All bits of rows that `encode_rows` makes lie in fields, and the bytes between heads in padding."""
    from kvtc_gguf.format import write

    calibration = synthetic.calibration(1, n_head=3, head_dim=64)
    path = tmp_path / "a.gguf"
    write(calibration, path)
    opened = Native(path)
    z = np.random.default_rng(0).standard_normal((50, 3, 64)).astype(np.float32)
    for name, side in (("k", 0), ("v", 1)):
        own = calibration.layers[0][name]
        for i, bits in enumerate(calibration.bits):
            rows = encode_rows(own, i, z, bits)
            array = ffi.new("struct ggml_kvtc_run[]", 1000)
            n = base.ggml_kvtc_cache_runs(opened.handle, 0, side, bits, rows.shape[1], array, 1000)
            runs = [Run(r.bits, r.kind, r.count) for r in array[0:n]]
            coded = sum(run.bytes for run in runs if run.kind == CODE)
            assert sum(run.bytes for run in runs) == rows.shape[1]
            assert coded == own.n_head + own.widths[:, i].astype(int).sum()  # gains, and w bytes for a group of w bits
            model = RowCodec.fit(runs, rows)
            np.testing.assert_array_equal(model.decode(model.encode(rows), len(rows)), rows)


def test_checksum_is_zlibs():
    data = np.random.default_rng(0).integers(0, 256, 1000).astype(np.uint8).tobytes()
    for n in (0, 1, 7, 8, 9, 63, 1000):
        assert base.ggml_kvtc_crc32(0, c_bytes(data), n) == zlib.crc32(data[:n])
        assert base.ggml_kvtc_crc32(zlib.crc32(data[:n]), c_bytes(data[n:]), len(data) - n) == zlib.crc32(data)
