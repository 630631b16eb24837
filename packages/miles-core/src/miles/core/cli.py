"""The ``miles`` command."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path

from miles.core import environ, plugins
from miles.core.config import Config, hooks_page, show
from miles.core.config.discover import FlagTable, flag_table
from miles.core.config.flag import FlagSpec
from miles.core.config.help import all_flags, explain, plain, usage
from miles.core.config.parser import explain_unknown
from miles.core.config.reference import json_schema, markdown
from miles.core.errors import ConfigError, MilesError, PluginError
from miles.core.registry import import_from
from miles.core.report import write_report

_HELP = """usage: miles COMMAND [FLAG ...]

Reinforcement learning for language models: prompts, engines, rewards, training, weights back to the engines.

commands:
  train          train a model
  train-async    train on one rollout while the next is generated
  config         show what a command line resolves to, explain flags, write the reference
  plugins        list what is installed: backends, engines, rewards, filters, trackers ...
  report         write the page about a run: curves, results, samples
  diagnose       say why engine and trainer give the same tokens different log-probabilities
  version        show the versions of Miles and of what it runs on

A first run, on any machine:
  miles train --train-backend fsdp --hf-checkpoint MODEL --prompt-data prompts.jsonl --label-key answer \\
      --rm-type math --num-rollout 100 --rollout-batch-size 8 --n-samples-per-prompt 8 \\
      --rollout-max-response-len 512 --save runs/first

The flags that most runs set:
{common}

`miles train --help` lists every flag; `miles config --explain FLAG` tells all about one.
Flags may stand in a file: miles train --config run.yaml
"""

_COMMON = (
    "hf_checkpoint",
    "prompt_data",
    "rm_type",
    "train_backend",
    "num_rollout",
    "rollout_batch_size",
    "n_samples_per_prompt",
    "rollout_max_response_len",
    "advantage_estimator",
    "lr",
    "eval_prompt_data",
    "eval_interval",
    "save",
    "save_interval",
)

_COLUMN = 32

_CONFIG_HELP = """usage: miles config [FLAG ...]

Shows what the flags of `miles train` resolve to, where every value is from, and everything that is wrong with them.

  --all               show defaults as well
  --json              write JSON
  --explain FLAG      what a flag is, who owns it, what it resolves to with the other flags given, and why
  --unsupported       flags that are refused when set, and why
  --reference [FILE]  write the Markdown reference of all flags
  --hooks [FILE]      write the Markdown reference of functions of your own: which flag calls what, and how
  --schema            write a JSON Schema for files of --config
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status.

    2: the command line or the configuration is wrong.  1: the run failed for a reason that the message tells.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output has gone, as in `miles train --help | head`, and misses nothing.  A run has failed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if arguments[:1] in (["train"], ["train-async"]) and not _wants_help(arguments):
            raise
        return 0
    return status


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if arguments else 2
    name, rest = arguments[0].removeprefix("--"), arguments[1:]
    command = _COMMANDS.get(name)
    if command is None:
        return _fail("miles", [f"{arguments[0]!r} is not a command. Commands: {', '.join(_COMMANDS)}"])
    import_from(Path.cwd())  # functions of the user's own are often files beside their data
    try:
        return command(rest)
    except ConfigError as error:
        return _fail(f"miles {name}", error.problems)
    except MilesError as error:
        cause = error.__cause__
        if cause is not None and not isinstance(cause, OSError):  # a refused connection, a missing file: all is said
            traceback.print_exception(cause)
        notes = getattr(error, "__notes__", [])
        return _fail(
            f"miles {name}", ["\n".join([str(error), *notes])], status=2 if isinstance(error, PluginError) else 1
        )
    except KeyboardInterrupt:
        return _fail(f"miles {name}", ["interrupted"], status=130)


def train(flags: list[str], *, command: str = "train") -> int:
    """``miles train``."""
    if _wants_help(flags):
        print(f"usage: miles {command} [FLAG ...]\n\n" + all_flags(flag_table()))
        return 0
    config = Config.from_flags(flags)
    environ.prepare_process()
    from miles.core.driver.run import train as run  # the driver reaches torch, which --help must not

    run(config)
    return 0


def train_async(flags: list[str]) -> int:
    """``miles train-async``: ``miles train`` with the flag that makes it asynchronous."""
    return train(["--async-training", *flags], command="train-async")


def config(flags: list[str]) -> int:
    """``miles config``."""
    if _wants_help(flags):
        print(_CONFIG_HELP)
        return 0
    options, rest = _split_options(flags)
    table = flag_table()
    if "--unsupported" in options:
        return _print_unsupported(table)
    if "--schema" in options:
        print(json.dumps(json_schema(table), indent=2))
    elif "--reference" in options:
        _write(options["--reference"], markdown(table))
    elif "--hooks" in options:
        _write(options["--hooks"], hooks_page.markdown(table))
    elif "--explain" in options:
        return _explain(options["--explain"], rest, table)
    else:
        return _show(rest, show_all="--all" in options, as_json="--json" in options)
    return 0


def list_plugins(flags: list[str]) -> int:
    """``miles plugins``."""
    _without_flags("plugins", "List what is installed, by entry-point group: name, distribution, object.", flags)
    for group, found in groupby(plugins.installed(), key=lambda plugin: plugin.group):
        print(group)
        entries = list(found)
        names = [plugin.name for plugin in entries]
        owners = [f"{plugin.distribution} {plugin.version}" for plugin in entries]
        wide, wider = max(map(len, names)), max(map(len, owners))
        for plugin, owner in zip(entries, owners):
            clash = "   <- registered twice, uninstall one" if names.count(plugin.name) > 1 else ""
            print(f"  {plugin.name:<{wide}}  {owner:<{wider}}  {plugin.target}{clash}")
    return 0


def report(flags: list[str]) -> int:
    """``miles report``."""
    parser = argparse.ArgumentParser(prog="miles report", description="Write one self-contained page about a run.")
    parser.add_argument("run", type=Path, help="directory of the run (--save)")
    parser.add_argument("--output", type=Path, help="file to write (default: report.html in the directory)")
    options = parser.parse_args(flags)
    print(write_report(options.run, options.output))
    return 0


def diagnose(flags: list[str]) -> int:
    """``miles diagnose``."""
    environ.prepare_process()
    try:
        from miles.core.diagnosis.command import main as run  # reaches torch and transformers
    except ModuleNotFoundError as error:
        raise PluginError(f"miles diagnose needs {error.name}: pip install 'miles-core[torch]' transformers") from error
    return run(flags)


def show_versions(flags: list[str]) -> int:
    """``miles version``."""
    _without_flags("version", "Show the versions of Miles and of what it runs on.", flags)
    others = ("torch", "transformers", "ray", "sglang", "flash-attn")
    for distribution in (*plugins.OWN_DISTRIBUTIONS, *others):
        try:
            print(f"{distribution:<15} {version(distribution)}")
        except PackageNotFoundError:
            print(f"{distribution:<15} not installed")
    print(f"{'Python':<15} {platform.python_version()} on {platform.platform()}")
    return 0


def _without_flags(command: str, description: str, flags: list[str]) -> None:
    """Answer ``--help`` and refuse everything else."""
    argparse.ArgumentParser(prog=f"miles {command}", description=description).parse_args(flags)


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "train-async": train_async,
    "config": config,
    "plugins": list_plugins,
    "report": report,
    "diagnose": diagnose,
    "version": show_versions,
}


def _split_options(flags: list[str]) -> tuple[dict[str, str], list[str]]:
    """Options of ``miles config`` itself, and the flags of the run it is asked about."""
    options: dict[str, str] = {}
    rest = list(flags)
    for name in ("--all", "--json", "--unsupported", "--schema", "--explain", "--reference", "--hooks"):
        if name in rest:
            position = rest.index(name)
            takes_value = name == "--explain" or (name in ("--reference", "--hooks") and len(rest) > position + 1)
            value = rest[position + 1 : position + 2] if takes_value else []
            del rest[position : position + 1 + len(value)]
            options[name] = value[0] if value else ""
    return options, rest


def _overview() -> str:
    table = flag_table()
    lines = [f"  {_column(spec)}{_first_sentence(spec.help)}" for name, spec in table.flags.items() if name in _COMMON]
    return _HELP.format(common="\n".join(lines)).rstrip()


def _column(spec: FlagSpec) -> str:
    """The flag with a stand-in for its value where that is short, padded."""
    text = usage(spec) if len(usage(spec)) < _COLUMN else spec.spelling
    return f"{text:<{_COLUMN}}"


def _first_sentence(text: str) -> str:
    return plain(text).split(". ")[0].split(": ")[0].rstrip(".")


def _show(flags: list[str], *, show_all: bool, as_json: bool) -> int:
    config, problems = Config.examine(flags)
    print((show.as_json if as_json else show.as_text)(config, show_all=show_all))
    return _fail("miles config", problems) if problems else 0


def _explain(name: str, flags: list[str], table: FlagTable) -> int:
    if not name:
        raise ConfigError("--explain needs the name of a flag")
    spec = table.find(name) or table.collector(name)
    if spec is None:
        raise ConfigError(explain_unknown("--" + name.lstrip("-"), table))
    config, problems = Config.examine(flags, check=False)
    print(explain(spec))
    print(f"  {'now:':<11}{show.state_of(config, spec)}")
    about = [problem for problem in problems if flags and spec.spelling in problem.split()]
    return _fail("miles config", about) if about else 0


def _print_unsupported(table: FlagTable) -> int:
    refused = show.unsupported()
    for line in refused:
        print(line)
    print(f"{len(refused)} of {len(table.by_spelling)} flags are refused when set", file=sys.stderr)
    return 0


def _write(target: str, text: str) -> None:
    if not target:
        print(text, end="")
        return
    path = Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _wants_help(flags: list[str]) -> bool:
    return any(flag in ("-h", "--help") for flag in flags)


def _fail(command: str, problems: Sequence[str], status: int = 2) -> int:
    if len(problems) == 1:
        print(f"{command}: {problems[0]}", file=sys.stderr)
        return status
    print(f"{command}: {len(problems)} problems", file=sys.stderr)
    for problem in problems:
        print(f"  - {problem}", file=sys.stderr)
    return status
