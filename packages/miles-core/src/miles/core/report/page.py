"""The page itself: a template, its style and script, and the data of one run."""

from __future__ import annotations

import html
import json
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from miles.core.errors import DataError
from miles.core.report import curves, samples, summary
from miles.core.report.results import evaluations
from miles.core.run_directory import RunDirectory
from miles.core.tracking.jsonl import read_records

STYLE = "page.css"
SCRIPTS = ("charts.js", "samples.js", "page.js")


def write_report(run_dir: Path, output: Path | None = None) -> Path:
    """Write the page about the run in ``run_dir``, to ``output`` or ``report.html`` in it; return where it is.

    Works at any time of a run's life: it shows what there is.  DataError when the directory holds no metrics.
    """
    run = RunDirectory(run_dir)
    target = output or run.report
    page = render(run)
    partial = target.with_name(target.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(target)
    return target


def render(run: RunDirectory) -> str:
    """The page as text."""
    records = list(read_records(run.metrics))
    if not records:
        raise DataError(f"{run.metrics}: no metrics there. Expected the directory of a run that has logged something")
    config = run.read_config()
    evaluated = evaluations(run)
    train_key = config.get("reward_key")
    results, facts = summary.results(config, records, evaluated), summary.facts(config, records)
    data = {
        "charts": curves.charts(records, evaluated),
        "comparisons": samples.comparisons(run, config.get("eval_reward_key") or train_key),
        "rollouts": samples.rollout_groups(run, train_key, scored=not summary.imitates(config)),
        "flags": _flags(run),
    }
    return Template(_asset("page.html")).substitute(
        title=html.escape(run.path.absolute().name),
        headline=html.escape(summary.headline(config)),
        results="".join(map(_result, results)),
        facts="".join(map(_fact, facts)),
        notes="".join(f"<li>{html.escape(note)}</li>" for note in summary.notes(records)),
        style=_asset(STYLE),
        script="\n".join(map(_asset, SCRIPTS)),
        data=_embedded(data),
    )


def _result(fact: summary.Fact) -> str:
    first = (
        f'<span class="first">{html.escape(fact["first"])}</span> <span class="arrow">→</span> '
        if fact["first"]
        else ""
    )
    return f'<li><p class="figure">{first}{html.escape(fact["last"])}</p><p>{html.escape(fact["note"])}</p></li>'


def _fact(fact: summary.Fact) -> str:
    return f"<div><dt>{html.escape(fact['name'])}</dt><dd>{html.escape(fact['value'])}</dd></div>"


def _flags(run: RunDirectory) -> list[list[str]]:
    """Name, value and origin of every flag."""
    if not run.config.is_file():
        return []
    entries = json.loads(run.config.read_text())
    return [[name, json.dumps(entry["value"]), entry["origin"]] for name, entry in sorted(entries.items())]


def _embedded(data: dict[str, Any]) -> str:
    """JSON that cannot end the script element that holds it, whatever a model wrote."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _asset(name: str) -> str:
    return resources.files("miles.core.report").joinpath(name).read_text(encoding="utf-8")
