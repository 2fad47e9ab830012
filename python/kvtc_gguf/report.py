"""A calibration in pictures, on one page: `python -m kvtc_gguf.report file.kvtc.gguf -o report.html`."""

from __future__ import annotations

import html
from collections import Counter
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from kvtc_gguf.console import one_line_errors
from kvtc_gguf.format import SIDES, Calibration, read
from kvtc_gguf.gguf_io import replacing
from kvtc_gguf.inspect import describe
from kvtc_gguf.layout import FormatError

ABSENT = (
    "Not in this file: an embedded calibration holds no statistics, nor does one made by an older version; "
    "KLD by layer is measured by calibrate --bpv only."
)
PAGE = Template("""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>$name: kvtc calibration</title><style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
table { border-collapse: collapse } td, th { padding: .15em .8em .15em 0; text-align: left; vertical-align: top }
svg { max-width: 100%; height: auto } p.absent { color: #777 }
</style></head><body>
<h1>kvtc calibration of $name</h1>
<table>$facts</table>
$sections
</body></html>
""")

app = typer.Typer(add_completion=False)


def page(calibration: Calibration, name: str) -> str:
    """The page as HTML. Raises FormatError where matplotlib is not installed."""
    try:
        from kvtc_gguf.report_figures import FIGURES, svg
    except ImportError as error:
        raise FormatError(f"reports need matplotlib: pip install 'kvtc-gguf[report]' ({error})") from error
    sections = []
    for number, (title, text, draw) in enumerate(FIGURES):
        figure = draw(calibration)
        body = f"<p>{text}</p>\n{svg(figure, number)}" if figure else f'<p class="absent">{ABSENT}</p>'
        sections.append(f"<h2>{title}</h2>\n{body}")
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in facts(calibration))
    return PAGE.substitute(name=html.escape(name), facts=rows, sections="\n".join(sections))


def facts(calibration: Calibration) -> list[tuple[str, str]]:
    """What the page says in words."""
    report = describe(calibration)
    result = [
        (key, str(report[key] or "–")) for key in ("architecture", "fingerprint", "corpus", "tokens", "tool", "date")
    ]
    result.append(("layers", f"{len(calibration.layers)} of {calibration.block_count} have a cache"))
    for side in SIDES:
        counts = Counter(name for sides in calibration.layers.values() for name in sides[side].transforms)
        transforms = ", ".join(f"{name} ({n})" for name, n in counts.most_common())
        bpv = ", ".join(f"kvtc{b}: {x:.2f}" for b, x in zip(report["bits"], report["bpv"][side], strict=True))
        result += [(f"{side.upper()} transforms", f"{transforms} heads"), (f"{side.upper()} bits per value", bpv)]
    return result


@app.command()
def main(
    file: Annotated[Path, typer.Argument(help="A calibration, or a model's GGUF that embeds one.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The page to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a page with a calibration's spectra, bits, errors, codebooks and budget."""
    with one_line_errors():
        if output.exists() and not force:
            raise FormatError(f"{output}: exists already; choose another -o, or replace it with --force")
        text = page(read(file), file.name)
        with replacing(output) as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(f"{output}: {output.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    app()
