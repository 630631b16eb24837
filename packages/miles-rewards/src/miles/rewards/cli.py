"""``miles-rewards``: grade a file, or serve rewards over HTTP."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TextIO, TypeVar

from miles.core.errors import DataError, MilesError
from miles.core.registry import Registry
from miles.rewards import __version__
from miles.rewards.batch import Columns, grade_samples, known_rewards, read_rows, samples_of
from miles.rewards.catalogue import GROUP
from miles.rewards.context import Settings
from miles.rewards.table import Graded, report

_Number = TypeVar("_Number", int, float)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status."""
    options = _parser().parse_args(arguments)
    try:
        status = int(options.command(options))
        sys.stdout.flush()
    except MilesError as error:
        print(f"miles-rewards: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has gone, as in `miles-rewards types | head`, and misses nothing
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="miles-rewards", description="Grade answers of language models.")
    parser.add_argument("--version", action="version", version=f"miles-rewards {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_grade(commands.add_parser("grade", help="grade a file", description="Grade the rows of a JSON Lines file."))
    _add_serve(commands.add_parser("serve", help="serve rewards over HTTP", description="Serve rewards over HTTP."))
    types = commands.add_parser("types", help="list the reward types", description="List the installed reward types.")
    types.set_defaults(command=_types)
    return parser


def _add_grade(parser: argparse.ArgumentParser) -> None:
    columns = Columns()
    parser.add_argument("--type", "--rm-type", required=True, help="reward type, as in --rm-type of a run")
    parser.add_argument("--input", required=True, type=Path, help="JSON Lines file")
    parser.add_argument("--output", type=Path, help="write the rows with their outcomes to this file")
    for name in ("response", "label", "metadata"):
        parser.add_argument(f"--{name}-key", default=getattr(columns, name), help=f"column of the {name} (%(default)s)")
    parser.add_argument("--expected", help="column with known rewards, to list the disagreements")
    parser.add_argument("--reward-key", help="entry of rewards that are mappings (default: their first number)")
    parser.add_argument("--list", type=_at_least(0, int), default=5, help="rows in each list (%(default)s)")
    _add_execution(parser)
    parser.set_defaults(command=_grade)


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--type", "--rm-type", required=True, action="append", help="type to offer; the first is the default"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=_port, default=8000, help="port to listen on, 0 for a free one (%(default)s)")
    parser.add_argument(
        "--max-body-bytes", type=_at_least(1, int), default=16 << 20, help="longest request (%(default)s)"
    )
    parser.add_argument("--max-batch", type=_at_least(1, int), default=1024, help="most items of a batch (%(default)s)")
    _add_execution(parser)
    parser.set_defaults(command=_serve)


def _add_execution(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers", type=_at_least(1, int), help="processes that grade (default: a quarter of the cores, 2 to 8)"
    )
    parser.add_argument(
        "--timeout", type=_at_least(0.001, float), help="seconds one grading may take (default: the type's own)"
    )
    parser.add_argument("--strict-upstream", action="store_true", help="grade as the original graders do")
    parser.add_argument("--url", "--rm-url", help="address of the service of the type remote_rm")


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 65535")
    return port


_port.__name__ = "int"  # argparse says so in its messages


def _at_least(least: _Number, number: Callable[[str], _Number]) -> Callable[[str], _Number]:
    def parse(text: str) -> _Number:
        value = number(text)
        if not value >= least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return value

    parse.__name__ = getattr(number, "__name__", "number")  # argparse says so in its messages
    return parse


def _settings(options: argparse.Namespace) -> Settings:
    return Settings(
        num_workers=options.workers,
        timeout_s=options.timeout,
        strict_upstream=options.strict_upstream,
        url=options.url,
        reward_key=getattr(options, "reward_key", None),
    )


def _grade(options: argparse.Namespace) -> int:
    columns = Columns(options.response_key, options.label_key, options.metadata_key)
    rows = read_rows(options.input)
    samples = samples_of(rows, options.input, columns)
    known = known_rewards(rows, options.input, options.expected) if options.expected else None
    with _output(options.output) as output:
        started = time.perf_counter()
        outcomes = asyncio.run(grade_samples(options.type, samples, _settings(options)))
        elapsed_s = time.perf_counter() - started
        if output is not None:
            for row, outcome in zip(rows.values(), outcomes):
                output.write(json.dumps({**row, "outcome": outcome._asdict()}) + "\n")
    graded = Graded(rows, outcomes, options.reward_key, columns.label, columns.response, known)
    for line in report(graded, elapsed_s, options.list):
        print(line)
    return 0


def _output(path: Path | None) -> AbstractContextManager[TextIO | None]:
    """The file for the outcomes, opened before time is spent on grading."""
    try:
        return nullcontext() if path is None else path.open("w")
    except OSError as error:
        raise DataError(f"--output {path}: {error.strerror}") from error


def _serve(options: argparse.Namespace) -> int:
    try:
        import uvicorn

        from miles.rewards import server
    except ModuleNotFoundError as error:
        raise MilesError(f"serving needs {error.name!r}: pip install 'miles-rewards[serve]'") from error
    limits = server.Limits(options.max_body_bytes, options.max_batch)
    app = server.create_app(options.type, _settings(options), limits)
    uvicorn.run(app, host=options.host, port=options.port, log_level="info", access_log=False)
    return 0


def _types(options: argparse.Namespace) -> int:
    registry = Registry(GROUP)
    for name in registry.names():
        print(f"{name:22} {registry.find(name) or ''}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
