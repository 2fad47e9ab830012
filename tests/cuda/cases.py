"""Cases of the attention operation for `tests.cuda.check`; tests/native/attention_case.py makes their data."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace


def cases() -> Iterator[tuple[str, object]]:
    """Names and cases; a name is unique."""
    from attention_case import Case
    from kvtc_gguf.reference_rope import Rope

    def neox(d: int) -> Rope:
        return Rope(d, neox=True)

    plain = Case(n_kv=200, exact="some")
    for k in range(1, 7):
        for v in range(1, 7):
            yield f"widths k{k}v{v}", replace(plain, k=k, v=v, heads=3, tokens=1 + (k + v) % 3)
    for d in (64, 80, 96, 128, 256):
        for tokens in (1, 3, 16, 17, 70):
            for heads in (1, 4):
                case = replace(plain, dk=d, heads=heads, tokens=tokens, rope=neox(d), k=2, v=4, n_kv=600)
                yield f"head_dim {d} tokens {tokens} heads {heads}", case
    for group in (1, 2, 4, 7, 8):
        for tokens in (1, 16, 40):
            case = replace(plain, dk=512, group=group, tokens=tokens, rope=neox(512), k=2, v=4, n_kv=400, heads=2)
            yield f"head_dim 512 group {group} tokens {tokens}", case
    yield "head_dim 512 softcap", replace(plain, dk=512, rope=neox(512), softcap=3.0, group=2, tokens=5, k=3, v=6)
    for group in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16):
        for tokens in (1, 2, 5, 16, 33):
            yield f"group {group} tokens {tokens}", replace(plain, group=group, tokens=tokens, heads=1 + group % 2)
    for n_kv in (1, 2, 15, 31, 32, 33, 64, 255, 256, 257, 1000, 5000):
        yield f"cells {n_kv}", replace(plain, tokens=1, n_kv=n_kv, empty=0)
        if n_kv >= 40:
            yield f"cells {n_kv}, prefill", replace(plain, tokens=40, n_kv=n_kv, empty=0, window=20)
    # heads whose widths differ get unequal numbers of blocks, on devices of 132 processors
    yield "unequal parts", replace(plain, tokens=1, n_kv=24_500, heads=32, empty=0, k=3, v=6)
    ropes = {
        "none": None,
        "normal": Rope(64, neox=False),
        "neox": neox(64),
        "normal 40 of 64": Rope(40, neox=False),
        "neox 40 of 64": neox(40),
        "neox 2 of 64": neox(2),
        "yarn": Rope(64, neox=True, freq_scale=0.25, ext_factor=1.0, n_ctx_orig=512),
        "attn factor": Rope(64, neox=False, attn_factor=1.5),
    }
    for name, rope in ropes.items():
        for order in ("contiguous", "shuffled", "sparse", "interleaved"):
            for start in (0, 61, 999_900):
                for tokens in (1, 30):
                    label = f"rope {name} {order} from {start} tokens {tokens}"
                    yield label, replace(plain, rope=rope, order=order, start=start, tokens=tokens)
    for exact in ("none", "store", "some", "batch"):
        for sinks, window in ((0, 0), (4, 0), (0, 32), (4, 32), (70, 100), (0, 10_000)):
            for tokens in (1, 12, 50):
                label = f"exact {exact} sinks {sinks} window {window} tokens {tokens}"
                yield label, replace(plain, exact=exact, sinks=sinks, window=window, tokens=tokens, n_kv=300)
    for window in (1, 40, 64, 100, 250):
        yield f"edge {window}", replace(plain, tokens=300, n_kv=1700, window=window, k=1, v=1, exact="store")
    for mask in ("causal", "holes", "dead", "none"):
        for tokens in (1, 4, 40):
            empty = 0 if mask == "none" else 70
            yield f"mask {mask} tokens {tokens}", replace(plain, mask=mask, tokens=tokens, empty=empty)
    for span in (1, 50, 2**31 - 1):
        for tokens in (1, 4, 16, 17, 40, 150):
            for order in ("contiguous", "shuffled"):
                case = replace(plain, mask="span", span=span, tokens=tokens, order=order, n_kv=1500, empty=70)
                yield f"span {span} {order} tokens {tokens}", case
    for streams in (2, 3):
        for tokens in (1, 20, 90):
            case = replace(plain, mask="span", span=300, streams=streams, tokens=tokens, n_kv=700, order="shuffled")
            yield f"span streams {streams} tokens {tokens}", case
    yield "span, two sequences", replace(plain, mask="span", tokens=1, order="interleaved", n_kv=700)
    for streams in (2, 3):
        for tokens in (1, 6, 20):
            yield f"streams {streams} tokens {tokens}", replace(plain, streams=streams, tokens=tokens, order="shuffled")
    for name, extra in {
        "softcap": {"softcap": 3.0, "dk": 128, "rope": neox(128)},
        "softcap, head_dim 64": {"softcap": 3.0},
        "sink logits": {"sink_logits": True},
        "alibi": {"max_bias": 8.0},
        "alibi, 6 heads": {"max_bias": 8.0, "heads": 3},
    }.items():
        for tokens in (1, 20):
            yield f"{name} tokens {tokens}", replace(plain, tokens=tokens, n_kv=600, **extra)
    for tokens in (1, 33):
        yield f"strided tokens {tokens}", replace(plain, permuted=True, tokens=tokens)
        yield f"strided batch tokens {tokens}", replace(plain, permuted=True, tokens=tokens, exact="batch", streams=2)
    yield from sides_cases(plain)
    for d in (64, 128, 256):
        yield from few_cases(replace(plain, dk=d, heads=1, rope=neox(d), k=2, v=4, n_kv=700), d)


def sides_cases(plain: object) -> Iterator[tuple[str, object]]:
    """Cases of which a side is of a turbo type, or beside one, of an ordinary type."""
    from kvtc_gguf.reference_rope import Rope

    kinds = [(f"turbo{k}", f"turbo{v}") for k in (2, 3, 4) for v in (2, 3, 4)]
    kinds += [("turbo3", 2), ("turbo2", 6), (1, "turbo4"), (3, "turbo2")]
    for other in ("f16", "q8_0"):
        kinds += [("turbo3", other), (other, "turbo4"), (3, other), (other, 4)]
    for k, v in kinds:
        for d in (64, 80, 96, 128, 256, 512):
            if d % 32 and "q8_0" in (k, v):
                continue
            case = replace(plain, k=k, v=v, dk=d, rope=Rope(d, neox=True), n_kv=700, heads=1 if d == 512 else 3)
            for tokens in (1, 4, 19):
                yield f"sides {k} {v} head_dim {d} tokens {tokens}", replace(case, tokens=tokens, group=1 + tokens % 3)
    for k, v in (
        ("turbo3", "turbo3"),
        ("turbo4", 2),
        (2, "turbo2"),
        ("q8_0", "turbo3"),
        ("turbo2", "f16"),
        (3, "q8_0"),
    ):
        case = replace(plain, k=k, v=v, heads=2)
        for group, tokens in ((1, 1), (4, 1), (7, 3), (8, 2), (16, 1), (3, 50)):
            yield f"sides {k} {v} group {group} tokens {tokens}", replace(case, group=group, tokens=tokens)
        for n_kv in (1, 17, 31, 33, 257, 5000, 20_000):
            yield f"sides {k} {v} cells {n_kv}", replace(case, tokens=1, n_kv=n_kv, empty=0)
        for exact in ("none", "store", "some", "batch"):
            for tokens in (1, 6, 50):
                extra = {"exact": exact, "tokens": tokens, "window": 40, "n_kv": 300}
                yield f"sides {k} {v} exact {exact} tokens {tokens}", replace(case, **extra)
        variants = {
            "shuffled": {"order": "shuffled", "start": 61},
            "sparse": {"order": "sparse", "exact": "none"},
            "far": {"start": 999_900},
            "interleaved": {"order": "interleaved"},
            "holes": {"mask": "holes"},
            "dead": {"mask": "dead"},
            "no mask": {"mask": "none", "empty": 0},
            "span": {"mask": "span", "span": 100, "order": "shuffled"},
            "streams": {"streams": 3, "order": "shuffled"},
            "softcap": {"softcap": 3.0, "dk": 128, "rope": Rope(128, neox=True)},
            "sink logits": {"sink_logits": True},
            "alibi": {"max_bias": 8.0, "heads": 3, "rope": None},
            "strided": {"permuted": True, "exact": "batch", "streams": 2},
        }
        for name, extra in variants.items():
            for tokens in (1, 5, 40):
                yield f"sides {k} {v} {name} tokens {tokens}", replace(case, n_kv=600, tokens=tokens, **extra)


def few_cases(plain: object, d: int) -> Iterator[tuple[str, object]]:
    """Cases of at most 8 query rows of one head_dim, for which sm_90a has kernels of its own."""
    from kvtc_gguf.reference_rope import Rope

    for k, v in ((1, 1), (2, 3), (3, 4), (2, 6), (4, 4), (6, 2), (6, 6)):
        yield f"few {d}, widths k{k}v{v}", replace(plain, k=k, v=v, heads=3, tokens=1 + (k + v) % 3)
    if d == 256:  # where tables of pairs have no room
        for k, v in ((3, 4), (4, 4), (4, 2), (5, 3)):
            yield f"few {d}, one token k{k}v{v}", replace(plain, k=k, v=v, heads=3, tokens=1)
        long = replace(plain, k=3, tokens=1, n_kv=3000, exact="store", window=90)
        yield f"few {d}, one token k3v4, long", long
    else:
        for k in range(1, 5):
            for v in range(1, 5):
                yield f"few {d}, one token k{k}v{v}", replace(plain, k=k, v=v, heads=3, tokens=1)
        for k, v in ((2, 4), (3, 4), (4, 4), (5, 5), (6, 6)):  # many slabs in order, seen and coded
            long = replace(plain, k=k, v=v, tokens=1, n_kv=3000, exact="store", window=90)
            yield f"few {d}, one token k{k}v{v}, long", long
        yield f"few {d}, cells 20000 of 8 heads, k4v4", replace(plain, tokens=1, n_kv=20_000, heads=8, empty=0, k=4)
    for group, tokens in ((1, 1), (2, 4), (4, 1), (4, 2), (8, 1), (1, 7)):
        yield f"few {d}, group {group} tokens {tokens}", replace(plain, group=group, tokens=tokens, n_kv=1000)
    for n_kv in (1, 17, 64, 65, 129, 1024, 20_000):
        yield f"few {d}, cells {n_kv}", replace(plain, tokens=1, n_kv=n_kv, empty=0)
    # long enough for stretches of 128 cells, with groups of more than 4 bits
    yield f"few {d}, cells 20000 of 8 heads", replace(plain, tokens=1, n_kv=20_000, heads=8, empty=0, v=6)
    variants = {
        "no rope": {"rope": None},
        "normal": {"rope": Rope(d, neox=False)},
        "neox, half": {"rope": Rope(d // 2, neox=True)},
        "normal, three quarters": {"rope": Rope(d * 3 // 4, neox=False)},
        "attn factor": {"rope": Rope(d, neox=True, attn_factor=1.5)},
        "shuffled": {"order": "shuffled", "start": 61},
        "sparse": {"order": "sparse"},
        "far": {"start": 999_900, "n_kv": 5000},
        "interleaved": {"order": "interleaved", "n_kv": 3000},
        "all exact": {"exact": "store", "window": 10_000},
        "batch exact": {"exact": "batch"},
        "nothing exact": {"exact": "none"},
        "long window": {"exact": "store", "window": 500, "n_kv": 1500},
        "window's edge": {"exact": "store", "window": 33, "n_kv": 400, "k": 1, "v": 1},
        "holes": {"mask": "holes"},
        "dead": {"mask": "dead"},
        "no mask": {"mask": "none", "empty": 0},
        "span": {"mask": "span"},
        "span 100, shuffled": {"mask": "span", "span": 100, "order": "shuffled"},
        "streams": {"streams": 3, "order": "shuffled"},
        "softcap": {"softcap": 3.0},
        "sink logits": {"sink_logits": True},
        "alibi": {"max_bias": 8.0, "heads": 3},
        "strided": {"permuted": True, "exact": "batch"},
    }
    for name, extra in variants.items():
        for group, tokens in ((4, 1), (2, 4), (7, 1)):
            yield f"few {d}, {name} group {group} tokens {tokens}", replace(plain, group=group, tokens=tokens, **extra)
    if d <= 128:  # many slabs for a block: one token of 5 to 8 query heads has a kernel of its own then
        many = replace(plain, tokens=1, group=7, heads=16, streams=2, n_kv=3100, exact="store", window=90)
        for group in (5, 6, 8):
            yield f"few {d}, many slabs, group {group}", replace(many, group=group)
        for k, v in ((1, 3), (3, 4), (4, 4), (6, 6)):
            yield f"few {d}, many slabs, k{k}v{v}", replace(many, k=k, v=v)
        if d == 64:  # as "unequal parts" above
            yield (
                "few 64, many slabs, unequal parts",
                replace(many, streams=1, heads=32, n_kv=24_500, empty=0, k=3, v=6),
            )
        yield f"few {d}, many slabs, swapped", replace(many, order="swapped", n_kv=9000)  # some stretches are plain
        for name, extra in variants.items():
            yield f"few {d}, many slabs, {name}", replace(many, **extra | {"n_kv": 3100, "heads": 16, "streams": 2})
    else:  # slabs enough for a block, most rotation pairs of which turn slowly: all but 51, and all but 32
        for slow, scale in (("slow pairs", 1.0), ("slower pairs", 0.125)):
            rope = Rope(d, neox=True, freq_base=1e6, freq_scale=scale)
            sizes = {"heads": 16, "streams": 2, "n_kv": 1100}
            many = replace(plain, tokens=1, group=2, exact="store", window=90, rope=rope, **sizes)
            for k, v in ((1, 3), (2, 4), (3, 4), (4, 4), (5, 6)):
                yield f"few {d}, {slow}, k{k}v{v}", replace(many, k=k, v=v)
            yield f"few {d}, {slow}, group 1", replace(many, group=1)
            # queries are turned around two anchors, then around two others
            yield f"few {d}, {slow}, cells 5000", replace(many, n_kv=5000)
            # some slabs of a stretch are plain
            yield f"few {d}, {slow}, swapped", replace(many, order="swapped", n_kv=5000)
            for name in variants if scale < 1 else ("shuffled", "interleaved", "holes", "normal, three quarters"):
                extra = variants[name] | sizes
                if extra.get("rope"):
                    extra["rope"] = replace(extra["rope"], freq_base=1e6, freq_scale=scale)
                yield f"few {d}, {slow}, {name}", replace(many, **extra)


# One key of a slab has a small gain: its warp once left the others' code, which multiplies with theirs.
ALWAYS = ("few 64, many slabs, window's edge",)


def quick_cases(names: list[str]) -> list[int]:
    """Every tenth case, and one of each kind (names that differ in numbers alone) that has none of these; ALWAYS."""
    kinds: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        kinds.setdefault(re.sub(r"\d+", "#", name), []).append(i)
    taken = set(range(0, len(names), 10)) | {i for i, name in enumerate(names) if name in ALWAYS}
    for of_kind in kinds.values():
        if taken.isdisjoint(of_kind):
            taken.add(of_kind[len(of_kind) // 2])
    return sorted(taken)
