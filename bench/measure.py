"""Quality, speed and memory of a matrix's cells. A failure becomes a row, and the next cell is measured."""

from __future__ import annotations

import dataclasses

from bench.harness import F16, Bench, Subject, Variant, planned
from bench.logs import RunError
from bench.matrix import Memory, Quality, Speed
from bench.perplexity import Perplexity, Statistics
from bench.results import Figure
from bench.speed import middle, paired, parse_bench


def quality(bench: Bench, model: Subject, test: Quality) -> None:
    """KLD, PPL and top-1 agreement with an f16 cache's logits, which are made once for each reference."""
    against = bench.engines[0].name if test.base == "first" else "the same engine"
    setting = f"{test.chunks} x {test.ctx} tokens of {bench.text_name}, ub {test.ubatch}, against f16 of {against}"
    setting = bench.setting(setting, "llama-perplexity", test)
    todo = list(planned(bench, bench.variants(model, test), test.name, setting, test.ctx))
    references = [bench.engines[0]] if test.base == "first" else bench.engines
    for reference in references:
        mine = [x for x in todo if test.base == "first" or x[0].engine == reference]
        if not mine:
            continue
        try:
            _save_base(bench, Variant(reference, model, F16), test, setting)
        except RunError as error:
            for variant, cell in mine:
                bench.fail(variant, cell, f"no f16 logits of {reference.name} to compare with: {error}")
            continue
        for variant, cell in mine:
            try:
                log = bench.log(variant, f"{test.name} {test.ctx}")
                found = _perplexity(bench, variant, test).measure(variant.cache, log)
            except RunError as error:
                bench.fail(variant, cell, error)
            else:
                bench.record(variant, cell, _quality_figures(found, test.chunks), found.sizes)


def _save_base(bench: Bench, variant: Variant, test: Quality, setting: str) -> None:
    """The logits that others are compared with; those of the last call where they are of the same file and setting.

    Several models may be one file with several calibrations. Raises RunError.
    """
    what = (variant.engine, variant.model.sha256, setting)
    if bench.base != what:
        bench.drop_base()
        bench.work.mkdir(parents=True, exist_ok=True)
        _perplexity(bench, variant, test).save_base(bench.log(variant, f"{test.name} base"))
        bench.base = what


def _perplexity(bench: Bench, variant: Variant, test: Quality) -> Perplexity:
    binary = variant.engine.tool("llama-perplexity")
    more = ("-ub", str(test.ubatch), *test.arguments, *bench.more(binary.stem))
    return Perplexity(binary, variant.model.path, bench.text.path, bench.base_file, test.ctx, test.chunks,
                      bench.threads, more, bench.matrix.limit)  # fmt: skip


def _quality_figures(found: Statistics, chunks: int) -> list[Figure]:
    return [
        Figure("kld", found.kld, "nats/token", found.errors.get("kld"), chunks),
        Figure("kld_p999", found.kld_p999, "nats/token", None, chunks),
        Figure("ppl", found.ppl, "", found.errors.get("ppl"), chunks),
        Figure("top1", found.top1, "%", found.errors.get("top1"), chunks),
    ]


def speed(bench: Bench, model: Subject, test: Speed) -> None:
    """Tokens a second by depth: A B A B, one llama-bench each, with ratios of neighbours and their spread.

    Each variant is paired with the f16 cache of its own engine, and with the same cache on the first engine. Where
    these have their result already, they run again beside what is still to be measured; only the ratios are taken.
    """
    setting = bench.setting(f"p {test.prompt} n {test.generate} x {test.repetitions}", "llama-bench", test)
    variants = bench.variants(model, test)
    for depth in test.depths:
        todo = dict(planned(bench, variants, test.name, setting, depth))
        errors: dict[Variant, str] = {}
        sizes = {}
        for variant in todo:
            try:
                sizes[variant] = bench.known_sizes(variant, depth + max(test.prompt, test.generate))
            except RunError as error:
                errors[variant] = str(error)
        beside = {x for variant in todo if variant not in errors for x in _references(bench, variant).values()}
        block = [variant for variant in variants if variant in todo or variant in beside]
        samples: dict[Variant, dict[str, list[float]]] = {variant: {} for variant in block}
        for _ in range(test.repetitions):
            for variant in block:
                if variant in errors:
                    continue
                try:
                    for name, rate in _bench(bench, variant, test, depth).items():
                        samples[variant].setdefault(name, []).append(rate)
                except (RunError, ValueError) as error:
                    errors[variant] = str(error)
        for variant, cell in todo.items():
            if variant in errors:
                bench.fail(variant, cell, errors[variant])
                continue
            others = {name: samples[other] for name, other in _references(bench, variant).items()
                      if other in samples and other not in errors}  # fmt: skip
            bench.record(variant, cell, _speed_figures(samples[variant], others), sizes[variant])


def _references(bench: Bench, variant: Variant) -> dict[str, Variant]:
    """What a variant's repetitions are divided by, under the names of the ratios."""
    found = {}
    if variant.cache != F16:
        found["f16"] = dataclasses.replace(variant, cache=F16)
    if variant.engine != bench.engines[0]:
        found[bench.engines[0].name] = dataclasses.replace(variant, engine=bench.engines[0])
    return found


def _bench(bench: Bench, variant: Variant, test: Speed, depth: int) -> dict[str, float]:
    arguments = ["-p", test.prompt, "-n", test.generate, "-d", depth, "-r", 1, "-o", "jsonl", *test.arguments]
    output = bench.run(variant, ("llama-bench",), arguments, f"{test.name} {depth}")
    rows = parse_bench(output.out, variant.model.name, variant.cache.name)
    found = {row.test: row.tokens_per_second for row in rows if row.depth == depth}
    wanted = [f"{x}{n}" for x, n in (("pp", test.prompt), ("tg", test.generate)) if n]
    if missing := [name for name in wanted if name not in found]:
        raise RunError(f"llama-bench printed no row for {missing[0]} at depth {depth}")
    return {name: found[name] for name in wanted}


def _speed_figures(samples: dict[str, list[float]], others: dict[str, dict[str, list[float]]]) -> list[Figure]:
    figures = [Figure(name, *_middle(taken, "t/s"), len(taken), tuple(taken)) for name, taken in samples.items()]
    for name, taken in samples.items():
        for other, base in others.items():
            if ratios := paired(taken, base.get(name, [])):
                figures.append(Figure(f"{name}/{other}", *_middle(ratios, "ratio"), len(ratios), tuple(ratios)))
    return figures


def _middle(samples: list[float], unit: str) -> tuple[float, str, float | None]:
    value, spread = middle(samples)
    return value, unit, spread


def memory(bench: Bench, model: Subject, test: Memory) -> None:
    """The parts of a cache by context; on a GPU also what the device has in use (MiB)."""
    variants, setting = bench.variants(model, test), bench.setting("", "llama-completion", test)
    for tokens in test.contexts:
        for variant, cell in planned(bench, variants, test.name, setting, tokens):
            try:
                sizes = bench.sizes(variant, tokens)
            except RunError as error:
                bench.fail(variant, cell, error)
                continue
            parts = ("codes", "exact", "bases", "compute")
            figures = [Figure("total", sizes.cache, "MiB")]
            figures += [Figure(part, getattr(sizes, part), "MiB") for part in parts]
            if sizes.device is not None:
                figures.append(Figure("device", sizes.device, "MiB"))
            bench.record(variant, cell, figures, sizes)
