import html.parser
import json
import re
import shutil
import subprocess

import pytest

from miles.core.errors import DataError
from miles.core.report import write_report
from miles.core.report.page import render
from miles.core.run_directory import RunDirectory
from miles.core.tracking import names
from miles.core.tracking.jsonl import JsonlTracker

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Outline(html.parser.HTMLParser):
    """Balance of tags, and the text of every element that has an id."""

    def __init__(self):
        super().__init__()
        self.open, self.texts, self.sources = [], {}, []

    def handle_starttag(self, tag, attributes):
        names = dict(attributes)
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append((tag, names.get("id")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, text):
        for _, identity in self.open:
            if identity:
                self.texts[identity] = self.texts.get(identity, "") + text


def outline(path):
    parser = Outline()
    parser.feed(path.read_text())
    parser.close()
    assert parser.open == []
    return parser


def test_the_page_is_whole_and_loads_nothing(run):
    page = outline(write_report(run.path))
    assert all(source.startswith("#") for source in page.sources)
    data = json.loads(page.texts["data"])
    assert data["charts"]
    assert data["comparisons"]
    addresses = set(re.findall(r"https?://[^\s\"'<)]+", run.report.read_text()))
    assert addresses <= {"http://www.w3.org/2000/svg"}


def test_text_of_a_model_cannot_leave_its_place(run):
    hostile = "</script><script>alert(1)</script>"
    path = run.eval_samples(40, "sums")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["prompt"] = hostile
        row["pieces"][0] = hostile
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = outline(write_report(run.path))
    assert json.loads(page.texts["data"])["comparisons"][0]["pairs"][0]["prompt"] == hostile
    assert hostile not in run.report.read_text()


def test_what_looks_wrong_stands_at_the_head(run):
    assert '<ul class="notes" aria-label="What looks wrong"></ul>' in render(run)
    tracker = JsonlTracker(None, run.path)
    for rollout_id in (40, 41):
        tracker.log({names.TRUNCATED: 1.0}, step=rollout_id, kind="rollout", rollout_id=rollout_id)
    tracker.close()
    assert "<li>after 42 rollouts: 100% of the responses are cut off" in render(run)


def test_the_page_can_be_written_elsewhere(run, tmp_path):
    assert write_report(run.path, tmp_path / "out.html") == tmp_path / "out.html"
    assert not run.report.exists()


def test_a_directory_without_metrics_is_refused(tmp_path):
    with pytest.raises(DataError, match="no metrics there"):
        write_report(RunDirectory(tmp_path).create().path)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_draws_every_chart_and_sample(run, tmp_path):
    page = write_report(run.path)
    quiet = "--no-first-run --disable-background-networking --disable-component-update --disable-sync --disable-quic"
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", *quiet.split()]
    command += [f"--user-data-dir={tmp_path}", "--virtual-time-budget=3000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.count("<figure>") >= 8
    assert done.stdout.count('class="curve"') >= 8
    assert 'class="token mark"' in done.stdout
    assert "became right" in done.stdout
