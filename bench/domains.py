"""Does a calibration hold on other text? ``python -m bench.domains model.gguf -o domains.csv``.

Calibrates on each kind of text of `bench.corpora` and on the default corpus, judges each on the held-out part of each
kind, and prints KLD over that of the calibration made on the same kind (so the diagonal is 1). Other corpora take part
by name and `calibrate`'s own arguments: ``--candidate "docs=--corpus docs=1 --tokens 8192"``.
"""

from __future__ import annotations

import csv
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from math import hypot
from pathlib import Path
from typing import Annotated

import typer

from bench import corpora
from bench.caches import Cache
from bench.csv_file import write_csv
from bench.perplexity import Perplexity

DEFAULT = "default"
FIELDS = ("calibrated", "judged", "cache", "kld", "error")

Row = dict[str, str]


def calibrated(model: Path, work: Path, name: str, arguments: Iterable[object], threads: int) -> Path:
    """The calibration of a model of this name in the work folder, made with calibrate's arguments unless it is there.

    Raises subprocess.CalledProcessError where calibrating fails.
    """
    file = work / f"{model.stem}-{name}.kvtc.gguf"
    command = [sys.executable, "-m", "kvtc_gguf.calibrate", model, "-o", file, "-t", threads, *arguments]
    if not file.exists():
        subprocess.run([str(word) for word in command], check=True)
    return file


def written(path: Path, kind: str, held_out: bool) -> Path:
    """The file of a text of `bench.corpora`; one that is there stays, as what is installed differs between machines."""
    if not path.exists():
        path.write_text(corpora.text(kind, held_out), encoding="utf-8")
    return path


def table(rows: list[Row], cache: str) -> str:
    """KLD over that of the calibration on the kind itself, ± the standard error if chunks were independent.

    Markdown; of several calibrations on a kind, such as prose-8192 and prose-16384, each is in turn what is divided by.
    """
    kld = {(r["calibrated"], r["judged"]): (float(r["kld"]), float(r["error"])) for r in rows if r["cache"] == cache}
    made = list(dict.fromkeys(name for name, _ in kld))
    judged = list(dict.fromkeys(kind for _, kind in kld))
    lines = [f"{cache}\n"]
    for suffix in dict.fromkeys(name.partition("-")[2] for name in made if name.partition("-")[0] in judged):
        lines += [f"over {suffix} | " + " | ".join(judged), "|".join(["---"] * (1 + len(judged)))]
        for name in made:
            cells = [name]
            for kind in judged:
                own, mine = kld.get((f"{kind}-{suffix}", kind)), kld.get((name, kind))
                ratio = mine[0] / own[0] if own and mine else float("nan")
                cells.append(
                    f"{ratio:.3f} ± {ratio * hypot(*(e / x for x, e in (own, mine))):.3f}" if own and mine else ""
                )
            lines.append(" | ".join(cells))
        lines.append("")
    return "\n".join(f"| {line} |" if "|" in line else line for line in lines)


def main(
    model: Path,
    output: Annotated[Path, typer.Option("-o", "--output", help="CSV of KLDs.")] = Path("domains.csv"),
    binaries: Annotated[Path, typer.Option("--bin")] = Path("build/bin"),
    caches: Annotated[list[str], typer.Option("--cache", help="Cache types.")] = ["kvtc-k2v2", "kvtc-k2v4"],  # noqa: B006
    tokens: Annotated[list[int], typer.Option(help="Of the calibrations by kind and default.")] = [16384],  # noqa: B006
    candidate: Annotated[list[str], typer.Option(help="NAME=ARGUMENTS of calibrate.")] = [],  # noqa: B006
    judged: Annotated[list[str], typer.Option(help="Kinds to judge on.")] = list(corpora.KINDS),  # noqa: B006
    chunks: Annotated[int, typer.Option(help="Chunks of 1024 tokens of each held-out text.")] = 16,
    work: Annotated[Path, typer.Option(help="Folder for texts, calibrations and logits.")] = Path("build/domains"),
    more: Annotated[str, typer.Option(help="Further arguments of llama-perplexity, such as '-ngl 99'.")] = "",
    threads: Annotated[int, typer.Option("-t", "--threads")] = os.cpu_count() or 1,
    show: Annotated[list[Path], typer.Option(help="Measure nothing; print these CSVs as one table.")] = [],  # noqa: B006
) -> None:
    """Measure the matrix; texts and calibrations in the work folder are used again, and figures in the CSV."""
    if show:
        rows = [row for path in show for row in csv.DictReader(path.open(newline=""))]
        print("\n".join(table(rows, cache) for cache in dict.fromkeys(row["cache"] for row in rows)))
        return
    work.mkdir(parents=True, exist_ok=True)
    wanted = {}
    for n in tokens:
        for kind in corpora.KINDS:
            wanted[f"{kind}-{n}"] = ["--tokens", n, "-f", written(work / f"{kind}.txt", kind, held_out=False)]
        wanted[f"{DEFAULT}-{n}"] = ["--tokens", n]
    for each in candidate:
        name, _, arguments = each.partition("=")
        wanted[name] = shlex.split(arguments)
    files = {name: calibrated(model, work, name, arguments, threads) for name, arguments in wanted.items()}
    rows = list(csv.DictReader(output.open(newline=""))) if output.exists() else []
    there = {(row["calibrated"], row["judged"], row["cache"]) for row in rows}
    for kind in judged:
        todo = [(made, cache) for made in files for cache in caches if (made, kind, cache) not in there]
        if not todo:
            continue
        text = written(work / f"{kind}-held-out.txt", kind, held_out=True)
        base = work / f"{kind}-{os.getpid()}.kld"
        run = Perplexity(binaries / "llama-perplexity", model, text, base, 1024, chunks, threads, tuple(more.split()))
        try:
            run.save_base()
            for made, cache in todo:
                with_file = replace(run, more=(*run.more, "--kvtc-file", str(files[made])))
                found = with_file.measure(Cache(cache, 4, 128))
                values = (made, kind, cache, f"{found.kld:.6f}", f"{found.errors['kld']:.6f}")
                rows.append(dict(zip(FIELDS, values, strict=True)))
                write_csv(output, FIELDS, rows)  # after each, so that the same command goes on from there
        finally:
            base.unlink(missing_ok=True)
    print("\n".join(table(rows, cache) for cache in caches))


if __name__ == "__main__":
    typer.run(main)
