"""Which nodes the CUDA backend computes beside the query's and the attention, checked without a GPU: branches.h is C++.

Failures caught: a node that reads what the other branch makes, memory that the graph's allocator gave to both, an
attention that would leave out more than its own token, a graph whose branches are never found.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from cffi import FFI

from tests.cxx import compiled, llama_cpp

KEEP, MASK, FUSED, SHARED, TWO, NO_EXACT, KEY_FIRST, OTHER = (1 << i for i in range(8))
# of the nodes that compute: key's and value's products; product, sum and write of each side
WRITES = [1] * 6


@pytest.fixture(scope="module")
def find(tmp_path_factory):
    """find_beside(variants) -> its result, and from the first node found on, which of those that compute are beside."""
    library = tmp_path_factory.mktemp("branches") / "branches.so"
    include = [llama_cpp() / "ggml" / name for name in ("include", "src")]
    sources = [Path(__file__).with_name("branches.cpp")]
    compiled(library, sources, include, "-shared", "-fPIC", "-DGGML_SHARED", link=True)
    ffi = FFI()
    ffi.cdef("int find_beside(int what, int * first, int * beside, int * n);")
    c = ffi.dlopen(str(library))

    def call(what: int) -> tuple[int, list[int]]:
        first, n, beside = ffi.new("int *"), ffi.new("int *"), ffi.new("int[64]")
        count = c.find_beside(what, first, beside, n)
        return count, list(beside[first[0] : n[0]]) if count >= 0 else []

    return call


def test_found_from_the_querys_product_on(find):
    # product, RoPE; then the key's and value's
    assert find(KEEP) == (8, [0, 0, 1, 1, *WRITES])


def test_found_where_keys_come_first(find):
    # they have been computed when the query's product comes
    assert find(KEEP | KEY_FIRST) == (6, [0, 0, *WRITES])


def test_none_where_memory_is_given_to_both(find):
    count, beside = find(0)
    assert count == -1, f"found {beside}, though what the key is made of may be gone before the attention ends"


def test_one_product_for_all_leaves_the_writes(find):
    count, beside = find(KEEP | FUSED)
    assert (count, beside) == (6, WRITES)


@pytest.mark.parametrize(
    "what", [MASK, TWO, NO_EXACT, OTHER], ids=["mask", "two tokens", "nothing exact", "another write"]
)
def test_none_where_attention_cannot_add_the_token_at_its_end(find, what):
    assert find(KEEP | what)[0] == -1


def test_what_is_made_of_the_query_comes_before(find):
    # the value's product and the writes are left
    assert find(KEEP | SHARED) == (7, [1, *WRITES])
