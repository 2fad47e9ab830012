"""Encode matrices that the loader derives. Failures caught: another matrix where rows were exchanged, where a dimension
is no whole number of panels, or where the processor has vectors; a machine whose codes are not the others'.
"""

from __future__ import annotations

from dataclasses import replace

import ffi
import numpy as np
import pytest
import synthetic
from kvtc_gguf.format import write


@pytest.mark.parametrize("d", [24, 64, 80, 96, 128, 200, 256, 512])
def test_the_inverse_is_the_same_with_and_without_vectors(tmp_path, monkeypatch, d):
    calibration = synthetic.calibration(1, 2, d, bits=(2,), seed=d)
    side = calibration.layers[0]["k"]
    order = np.random.default_rng(d).permutation(d)  # pivots off the diagonal
    decode = side.decode[:, order, :]
    calibration.layers[0]["k"] = replace(side, decode=decode)
    write(calibration, tmp_path / "c.gguf")
    found = []
    for value in (None, "1"):
        if value:
            monkeypatch.setenv("GGML_KVTC_NO_VECTORS", value)
        found.append(ffi.Native(tmp_path / "c.gguf").encode_matrix(0, ffi.K)[0])
    np.testing.assert_array_equal(found[0], found[1])
    wanted = np.linalg.inv(decode.astype(np.float16).astype(np.float64))
    np.testing.assert_allclose(found[0], wanted, atol=2e-6 * np.abs(wanted).max())
