// Which cases of the kvtc operations test-backend-ops runs. Not the full product: each block varies what its comment names, the
// rest stays as kvtc_write and kvtc_read have it. Run alone: test-backend-ops -o KVTC_SET_ROWS,KVTC_SET_ROWS_FUSED,KVTC_ATTN
#pragma once

#include "kvtc-cases.h"

static int kvtc_heads(int d) {
    return d == 64 ? 3 : d >= 256 ? 1 : 2;
}

static void kvtc_add_writes(std::vector<std::unique_ptr<test_case>> & cases) {
    const auto add = [&](int d, auto && change) {
        kvtc_write c;
        c.d     = d;
        c.heads = kvtc_heads(d);
        change(c);
        cases.emplace_back(new test_kvtc_set_rows(c));
    };
    for (int d : { 64, 80, 96, 128, 256 }) {
        // types (0: exact rows) and sides
        for (int bits = 0; bits <= GGML_KVTC_MAX_BITS; ++bits) {
            add(d, [&](auto & c) { c.kind = bits; c.side = bits % 2; });
        }
        for (int kind : { kvtc_test::TURBO2, kvtc_test::TURBO3, kvtc_test::TURBO4 }) {
            add(d, [&](auto & c) { c.kind = kind; c.side = kind % 2; });
            for (int tokens : { 1, 16 }) {
                add(d, [&](auto & c) { c.kind = kind; c.tokens = tokens; c.memory = 1; c.fused = true; c.heads = kind == kvtc_test::TURBO3 ? 1 : c.heads; });
            }
        }
        add(d, [&](auto & c) { c.kind = 3; c.side = GGML_KVTC_V; c.tokens = 1; });
        add(d, [&](auto & c) { c.kind = 4; c.side = GGML_KVTC_K; c.tokens = 300; c.heads = 4; });
        // memory of z
        for (int memory : { 1, 2 }) {
            add(d, [&](auto & c) { c.kind = 2; c.memory = memory; });
            add(d, [&](auto & c) { c.kind = 0; c.memory = memory; });
        }
        // product, sum and write, as decode has them
        for (int tokens : { 1, 16 }) {
            add(d, [&](auto & c) { c.kind = tokens == 1 ? 2 : 4; c.side = tokens == 1 ? GGML_KVTC_K : GGML_KVTC_V; c.tokens = tokens; c.memory = 1; c.fused = true; });
        }
    }
}

static void kvtc_add_reads(std::vector<std::unique_ptr<test_case>> & cases) {
    const auto add = [&](int d, auto && change) {
        kvtc_read c;
        c.d     = d;
        c.heads = kvtc_heads(d);
        change(c);
        cases.emplace_back(new test_kvtc_attn(c));
    };
    // types and head_dim
    for (int d : { 64, 80, 96, 128, 256 }) {
        for (auto [k, v] : { std::pair{1, 1}, {1, 3}, {2, 2}, {2, 4}, {3, 4}, {4, 4}, {5, 5}, {6, 6} }) {
            add(d, [&, k = k, v = v](auto & c) { c.k = k; c.v = v; });
        }
        add(d, [&](auto & c) { c.k = 1; c.v = 6; c.tokens = 16; });
        add(d, [&](auto & c) { c.k = 6; c.v = 1; c.tokens = 40; });
    }
    // turbo types, and one side of another kind
    for (int d : { 64, 80, 96, 128, 256, 512 }) {
        using namespace kvtc_test;
        for (auto [k, v] : { std::pair<int, int>{TURBO2, TURBO2}, {TURBO3, TURBO3}, {TURBO4, TURBO4}, {TURBO3, 3}, {2, TURBO4},
                             {TURBO3, PLAIN_F16}, {PLAIN_F16, TURBO4}, {2, PLAIN_F16}, {PLAIN_F16, 4}, {TURBO2, PLAIN_Q8_0}, {PLAIN_Q8_0, 3} }) {
            if (d % 32 != 0 && (k == PLAIN_Q8_0 || v == PLAIN_Q8_0)) {
                continue;
            }
            for (int tokens : { 1, 4, 40 }) {
                add(d, [&, k = k, v = v](auto & c) { c.k = k; c.v = v; c.tokens = tokens; c.group = 1 + tokens % 3; });
            }
        }
    }
    for (kvtc_exact exact : { KVTC_NONE, KVTC_STORE, KVTC_SOME, KVTC_BATCH }) {
        for (kvtc_mask mask : { KVTC_CAUSAL, KVTC_DEAD, KVTC_ALL }) {
            for (int tokens : { 3, 40 }) {
                add(128, [&](auto & c) { c.k = kvtc_test::TURBO3; c.v = kvtc_test::TURBO4; c.mask = mask; c.exact = exact; c.tokens = tokens; c.empty = mask == KVTC_ALL ? 0 : 9; });
            }
        }
    }
    for (int streams : { 1, 2 }) {
        for (int tokens : { 1, 20 }) {
            add(64, [&](auto & c) { c.k = c.v = kvtc_test::TURBO3; c.n_kv = 4096; c.streams = streams; c.tokens = tokens; c.cells = KVTC_SHUFFLED; });
            add(128, [&](auto & c) { c.k = c.v = kvtc_test::TURBO2; c.streams = streams; c.tokens = tokens; c.softcap = 20.0f; c.sink_logits = true; c.memory = 2; });
            add(128, [&](auto & c) { c.k = kvtc_test::TURBO4; c.v = 2; c.streams = streams; c.tokens = tokens; c.alibi = 8.0f; c.heads = 3; c.group = 2; });
        }
    }
    // query heads of a kv head, query rows
    for (int tokens : { 1, 2, 5, 16, 17, 64 }) {
        for (int group : { 1, 2, 4, 7, 8 }) {
            add(group % 2 ? 64 : 128, [&](auto & c) { c.v = 3; c.group = group; c.tokens = tokens; });
        }
    }
    for (int d : { 80, 96, 256, 512 }) {
        for (int group : { 1, 7 }) {
            for (int tokens : { 1, 17 }) {
                add(d, [&](auto & c) { c.group = group; c.tokens = tokens; c.exact = KVTC_STORE; });
            }
        }
    }
    // masks and exact tokens
    for (kvtc_mask mask : { KVTC_CAUSAL, KVTC_HOLES, KVTC_DEAD, KVTC_ALL }) {
        for (kvtc_exact exact : { KVTC_NONE, KVTC_STORE, KVTC_SOME, KVTC_BATCH }) {
            for (int tokens : { 3, 40 }) {
                add(128, [&](auto & c) { c.mask = mask; c.exact = exact; c.tokens = tokens; c.empty = mask == KVTC_ALL ? 0 : 9; });
            }
        }
    }
    for (int span : { 1, 100, INT_MAX }) {
        for (int d : { 80, 128, 256 }) {
            for (int tokens : { 1, 5, 40 }) {
                add(d, [&](auto & c) { c.mask = KVTC_SPAN; c.span = span; c.tokens = tokens; c.n_kv = 400; c.cells = d == 128 ? KVTC_SHUFFLED : KVTC_IN_ORDER; });
            }
        }
    }
    // sinks and windows: none, of codes alone, larger than the context
    for (auto [sinks, window] : { std::pair{0, 0}, {4, 0}, {0, 128}, {64, 1}, {4, 1000} }) {
        for (int tokens : { 1, 40 }) {
            add(64, [&, sinks = sinks, window = window](auto & c) { c.sinks = sinks; c.window = window; c.tokens = tokens; c.exact = KVTC_STORE; });
        }
    }
    // memory of q and z
    for (int memory : { 0, 2 }) {
        for (int tokens : { 1, 17 }) {
            add( 80, [&](auto & c) { c.memory = memory; c.tokens = tokens; });
            add(128, [&](auto & c) { c.memory = memory; c.tokens = tokens; c.streams = 2; });
        }
    }
    // what changes the logits
    for (int tokens : { 1, 5, 64 }) {
        add(128, [&](auto & c) { c.tokens = tokens; c.softcap = 20.0f; });
        add(128, [&](auto & c) { c.tokens = tokens; c.alibi = 8.0f; c.rope = GGML_KVTC_ROPE_NONE; c.heads = 3; c.group = 2; });
        add(128, [&](auto & c) { c.tokens = tokens; c.sink_logits = true; });
        add( 64, [&](auto & c) { c.tokens = tokens; c.sink_logits = true; c.softcap = 20.0f; c.mask = KVTC_DEAD; });
    }
    // rotations
    for (int d : { 64, 96, 128, 256 }) {
        for (int tokens : { 1, 33 }) {
            add(d, [&](auto & c) { c.tokens = tokens; c.rope = GGML_KVTC_ROPE_NONE; });
            add(d, [&](auto & c) { c.tokens = tokens; c.rope = GGML_KVTC_ROPE_NORMAL; });
            add(d, [&](auto & c) { c.tokens = tokens; c.rope = tokens == 1 ? GGML_KVTC_ROPE_NORMAL : GGML_KVTC_ROPE_NEOX; c.n_rot = d/2; });
        }
    }
    // of which most turn slowly, with cells enough
    for (double base : { 1e6, 1e10 }) {
        for (kvtc_cells cells : { KVTC_IN_ORDER, KVTC_SHUFFLED }) {
            add(256, [&](auto & c) { c.base = base; c.heads = 16; c.group = 2; c.streams = 2; c.n_kv = 1100; c.cells = cells; });
        }
    }
    for (int tokens : { 1, 33 }) {
        add( 80, [&](auto & c) { c.tokens = tokens; c.n_rot = 20; });
        add( 80, [&](auto & c) { c.tokens = tokens; c.n_rot = 32; c.rope = GGML_KVTC_ROPE_NORMAL; });
        add(128, [&](auto & c) { c.tokens = tokens; c.mscale = 1.2f; });
        add(128, [&](auto & c) { c.tokens = tokens; c.start = 1000000; });
    }
    // cells
    for (kvtc_cells cells : { KVTC_SHUFFLED, KVTC_SPARSE, KVTC_TWO_SEQS }) {
        for (int tokens : { 1, 5, 40 }) {
            add(64, [&](auto & c) { c.cells = cells; c.tokens = tokens; c.n_kv = 320; c.empty = 40; });
        }
    }
    // depths and streams
    for (auto [n_kv, empty] : { std::pair{64, 0}, {64, 31}, {1024, 24}, {4096, 1}, {5120, 200} }) {
        for (int streams : { 1, 2 }) {
            for (int tokens : { 1, 20 }) {
                add(n_kv == 1024 ? 128 : 64, [&, n_kv = n_kv, empty = empty](auto & c) {
                    c.n_kv = n_kv; c.empty = empty; c.streams = streams; c.tokens = tokens; c.window = 128;
                });
            }
        }
    }
}

static void kvtc_add_test_cases(std::vector<std::unique_ptr<test_case>> & cases) {
    kvtc_add_writes(cases);
    kvtc_add_reads (cases);
}
