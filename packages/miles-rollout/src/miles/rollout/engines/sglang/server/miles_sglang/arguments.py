# mypy: disable-error-code="import-not-found"
"""``python -m miles_sglang.arguments``: the arguments of the installed server, as JSON."""

from __future__ import annotations

import argparse
import json
from typing import Any

from miles_sglang import standins


def describe(action: argparse.Action) -> dict[str, Any]:
    """What Miles needs to check a value before the server sees it."""
    return {
        "flags": [text for text in action.option_strings if text.startswith("--")],
        "type": getattr(action.type, "__name__", "str") if action.type else "str",
        "choices": None if action.choices is None else [str(choice) for choice in action.choices],
        "several": action.nargs in ("*", "+") or (isinstance(action.nargs, int) and action.nargs > 1),
        "switch": action.nargs == 0,
    }


def main() -> None:
    """Print one JSON object."""
    standins.install()
    from sglang.srt.server_args import ServerArgs
    from sglang.version import __version__

    parser = argparse.ArgumentParser(add_help=False)
    ServerArgs.add_cli_args(parser)
    arguments = [describe(action) for action in parser._actions if action.option_strings]
    print(json.dumps({"version": __version__, "arguments": arguments}))  # noqa: T201 - the program's result


if __name__ == "__main__":
    main()
