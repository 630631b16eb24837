"""The command ``miles diagnose``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from miles.core.diagnosis.diagnose import diagnose
from miles.core.diagnosis.verdict import Cause
from miles.core.errors import ConfigError
from miles.core.run_directory import RunDirectory


def main(flags: list[str]) -> int:
    """Print the diagnosis of a rollout; 0 when engine and trainer agree, 1 when they do not."""
    parser = argparse.ArgumentParser(
        prog="miles diagnose",
        description="Say why the engine's log-probabilities differ from the trainer's: wrong weights, stale version, "
        "temperature, truncated support, template shift or precision. Scores the samples of a rollout again with the "
        "weights that the run has of that time, on the CPU.",
    )
    parser.add_argument("run", type=Path, help="directory of the run (--save)")
    parser.add_argument("--rollout", type=int, help="which rollout (default: the latest whose weights are there)")
    parser.add_argument(
        "--weights", action="append", default=[], metavar="VERSION=DIR", help="a Hugging Face directory of a version"
    )
    parser.add_argument("--max-tokens", type=int, default=20_000, help="tokens to score (default: 20000)")
    options = parser.parse_args(flags)
    found = diagnose(RunDirectory(options.run), options.rollout, dict(map(_given, options.weights)), options.max_tokens)
    sys.stdout.write(found.text() + "\n")
    return 0 if found.verdict.cause is Cause.AGREE else 1


def _given(text: str) -> tuple[int, Path]:
    version, equals, directory = text.partition("=")
    if not equals or not version.isdigit() or not (Path(directory) / "config.json").is_file():
        raise ConfigError(f"--weights {text}: expected VERSION=DIR, where DIR is a model in Hugging Face form")
    return int(version), Path(directory)
