"""The report of a comparison: one HTML file that needs no other, no network and no script.

Names, settings, prompts and paths are the user's text and may hold anything: they reach the page through `_text` alone.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import pandas

from qwen_image.comparison.curves import DARK, LIGHT, curves_svg, has_curves, line_style
from qwen_image.comparison.pictures import Samples
from qwen_image.comparison.ranking import differing_settings, notes, printable, shared_settings, table
from qwen_image.comparison.runs import Run
from qwen_image.sampling.sheet import thumbnail

QUALITY = 88
"""Of the small pictures, as JPEG; those of full size lie where generate_samples put them."""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""The page loads nothing and runs nothing, whatever gets into it."""
HEADINGS = {
    "rank": "rank",
    "run": "run",
    "best_validation_loss": "best validation loss",
    "best_step": "at step",
    "final_validation_loss": "final validation loss",
    "final_training_loss": "final training loss",
    "steps": "steps",
    "train_seconds": "training time",
    "steps_per_second": "steps/s",
}
"""Columns of the ranking, settings between steps and times."""
STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --text: #1a1a1a; --faint: #5c5c5c; --rule: #d0d0d0; --shade: #eef3f8;
  --mark: #ffe9a8; }
@media (prefers-color-scheme: dark) { :root { --page: #161616; --text: #f2f2f2; --faint: #a8a8a8; --rule: #444444;
  --shade: #1f2a33; --mark: #5a4a10; } }
body { background: var(--page); color: var(--text); font: 15px/1.45 system-ui, sans-serif; margin: 2em auto;
  max-width: 90em; padding: 0 1.5em; }
h2 { margin-top: 2em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { border-bottom: 1px solid var(--rule); padding: 0.35em 0.8em; text-align: left; vertical-align: top; }
th { font-weight: 600; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.setting { background: var(--shade); overflow-wrap: break-word; max-width: 22em; }
.other { background: var(--mark); font-weight: 600; }
.faint, figcaption { color: var(--faint); }
code { overflow-wrap: anywhere; }
svg { max-width: 100%; height: auto; }
.line { width: 3em; height: 0.8em; max-width: none; }
img { display: block; max-width: 20em; height: auto; }
"""


def report_html(runs: Sequence[Run], samples: Samples) -> str:
    """Return the page for runs in the order in which they are to be shown."""
    return "\n".join([
        "<!DOCTYPE html>",
        '<html lang="en">',
        '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        f"<title>{_title(runs)}</title><style>{_line_colours()}{STYLE}</style></head>",
        "<body>",
        f"<h1>{_title(runs)}</h1>",
        *_notes(runs),
        *_ranking(runs),
        *_curves(runs),
        *_samples(samples),
        *_files(runs),
        *_shared(runs),
        "</body>",
        "</html>",
        "",
    ])  # fmt: skip


def _title(runs: Sequence[Run]) -> str:
    return "1 run" if len(runs) == 1 else f"{len(runs)} runs compared"


def _line_colours() -> str:
    def rule(colours: Sequence[str]) -> str:
        return "".join(f" --line-{index}: {colour};" for index, colour in enumerate(colours))

    return f":root {{{rule(LIGHT)} }} @media (prefers-color-scheme: dark) {{ :root {{{rule(DARK)} }} }}"


def _notes(runs: Sequence[Run]) -> Iterator[str]:
    if lines := list(notes(runs)):
        yield "<ul>"
        yield from (f"<li>{_text(line)}</li>" for line in lines)
        yield "</ul>"


def _ranking(runs: Sequence[Run]) -> Iterator[str]:
    settings = differing_settings(runs)
    rows = table(runs)
    *results, seconds, speed = HEADINGS
    yield "<h2>Ranking</h2>"
    if settings:
        yield '<p class="faint">Shaded: the settings that differ. Marked: the rarer values.</p>'
    yield '<div class="wide"><table><thead><tr><th></th>'
    yield from (f"<th>{HEADINGS[column]}</th>" for column in results)
    yield from (f'<th class="setting">{_text(key)}</th>' for key in settings)
    yield f"<th>{HEADINGS[seconds]}</th><th>{HEADINGS[speed]}</th></tr></thead><tbody>"
    usual = {key: _usual(list(rows[key])) for key in settings}
    for index, (run, row) in enumerate(zip(runs, rows.to_dict("records"), strict=True)):
        yield f"<tr><td>{_line(index)}</td>"
        for column in results:
            yield _result(run, column, row[column])
        for key in settings:
            yield _setting(row[key], usual[key]) if run.settings else '<td class="setting"></td>'
        yield f'<td class="number">{_duration(row[seconds])}</td><td class="number">{_number(row[speed])}</td></tr>'
    yield "</tbody></table></div>"


def _result(run: Run, column: str, value: object) -> str:
    if column == "run":
        state = "" if run.trained else f'<br><span class="faint">{_text(run.state)}</span>'
        return f"<td>{_text(run.name)}{state}</td>"
    return f'<td class="number">{_number(value)}</td>'


def _setting(value: str, usual: set[str]) -> str:
    other = "" if value in usual else " other"
    return f'<td class="setting{other}">{_text(value) or "not set"}</td>'


def _curves(runs: Sequence[Run]) -> Iterator[str]:
    if has_curves(runs):
        yield "<h2>Loss</h2><figure>"
        yield curves_svg(runs)
        names = "".join(f"<li>{_line(index)} {_text(run.name)}</li>" for index, run in enumerate(runs))
        yield f'<figcaption><ul style="list-style: none">{names}</ul></figcaption></figure>'


def _samples(samples: Samples) -> Iterator[str]:
    if not samples.runs:
        return
    yield '<h2>Samples</h2><div class="wide"><table><thead><tr><th></th>'
    yield from (f"<th>{_text(prompt)}</th>" for prompt in samples.prompts)
    yield "</tr></thead><tbody>"
    for label, files in zip(samples.labels, samples.files, strict=True):
        yield f"<tr><th>{_text(label)}</th>"
        for prompt, file in zip(samples.prompts, files, strict=True):
            picture = f'<img src="{_data(file)}" alt="{_text(f"{label}: {prompt}")}">' if file else "no picture"
            yield f"<td>{picture}</td>"
        yield "</tr>"
    yield "</tbody></table></div>"


def _files(runs: Sequence[Run]) -> Iterator[str]:
    yield '<h2>LoRAs</h2><div class="wide"><table><thead><tr><th>run</th><th>LoRA</th><th>SHA-256</th>'
    yield "<th>LoRA of the lowest validation loss</th></tr></thead><tbody>"
    for run in runs:
        cells = (run.lora, run.sha256, run.best_lora)
        texts = "".join(f"<td><code>{_text(cell or '')}</code></td>" for cell in cells)
        yield f"<tr><td>{_text(run.name)}</td>{texts}</tr>"
    yield "</tbody></table></div>"


def _shared(runs: Sequence[Run]) -> Iterator[str]:
    yield "<h2>Settings</h2><details><summary>what all runs have in common</summary><table>"
    for key, value in shared_settings(runs).items():
        yield f"<tr><th>{_text(key)}</th><td>{_text(value)}</td></tr>"
    yield "</table></details>"


def _usual(values: Sequence[str]) -> set[str]:
    """The values that most runs have: all of them where none is more frequent than another."""
    counts = Counter(values)
    return {value for value, count in counts.items() if count == max(counts.values())}


def _line(index: int) -> str:
    colour, dash = line_style(index)
    stroke = f'stroke="{colour}" stroke-width="3" stroke-dasharray="{dash}"'
    return f'<svg class="line" viewBox="0 0 36 10" aria-hidden="true"><path d="M0 5H36" {stroke}/></svg>'


def _data(file: Path) -> str:
    stream = io.BytesIO()
    thumbnail(file).save(stream, format="JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _number(value: object) -> str:
    """A number in short; nothing where there is none."""
    if pandas.isna(value):
        return ""
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def _duration(seconds: float) -> str:
    if pandas.isna(seconds):
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _text(text: object) -> str:
    return escape(printable(str(text)))
