"""What tests of the CUDA code share."""

from __future__ import annotations

from pathlib import Path

import pytest
from cffi import FFI

from tests.cxx import compiled, llama_cpp


@pytest.fixture(scope="session")
def plans(tmp_path_factory):
    """The planning functions, compiled; needs a C++ compiler, as the build does."""
    library = tmp_path_factory.mktemp("plan") / "plan.so"
    include = [llama_cpp() / "ggml" / "include"]
    compiled(library, [Path(__file__).with_name("plan.cpp")], include, "-Werror", "-shared", "-fPIC")
    ffi = FFI()
    ffi.cdef("""
        int  plan_decode (const int * shape, int n_sm, long shared, long * out);
        int  plan_decode_sides(const int * shape, const int * kinds, int n_sm, long shared, long * out);
        int  plan_sm90_sides(const int * shape, const int * kinds);
        int  plan_sm90   (const int * shape, int n_sm, long shared, long * out);
        void plan_sm90_parts(const int * shape, int n_sm, long shared, int * out);
        int  get_slab(int n_slab, int n_fine, int i, int n_part);
        int  plan_sm90_d256(const int * shape, int n_sm, long shared, long * out);
        int  plan_sm90_slow(const int * shape, int n_sm, long shared, long * out);
        void get_slow_nodes(int * out, double * angle);
        void plan_prefill(const int * shape, int n_sm, long scratch, int n_exact, int n_cols, long * out);
        int  plan_tiles  (const int * shape, int n_sm, long scratch, int n_exact, long * out);
        long scratch_size(const int * shape, int n_sm, long scratch, int n_exact, int n_cells, int tiles);
        long decode_scratch_size(long scratch, long need);
    """)
    return ffi, ffi.dlopen(str(library))
