# mypy: disable-error-code="import-not-found"
"""``python -m miles_sglang.serve ARG ...``: SGLang's own server, which also takes weights from shared memory and keeps
prefixes by weight version.

SGLang's workers are spawned and import this module again; what is installed here is installed there.
"""

from __future__ import annotations

import sys

from miles_sglang import prefixes, weights

weights.install()
prefixes.install()


def main(argv: list[str]) -> None:
    """Serve until told to stop."""
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args

    # Shown by /server_info: this is how a trainer knows what the server can do.
    run_server(prepare_server_args([*argv, "--custom-weight-loader", weights.LOAD_FORMAT, prefixes.MARK]))


if __name__ == "__main__":
    main(sys.argv[1:])
