# mypy: disable-error-code="import-not-found"
"""``python -m miles_sglang.serve ARG ...``: SGLang's own server, which also takes weights from shared memory and keeps
prefixes by weight version.

SGLang's workers are spawned and import this module again; what is installed here is installed there.
"""

from __future__ import annotations

import os
import sys

from miles_sglang import adapter, changes, files, lost_partners, pairing, prefixes, weights

weights.install()
prefixes.install()
if files.VARIABLE in os.environ:
    files.install(os.environ[files.VARIABLE])
if "--enable-lora" in sys.argv:
    adapter.install()
if "--disaggregation-mode" in sys.argv:
    pairing.install_patience()
    lost_partners.install()


def main(argv: list[str]) -> None:
    """Serve until told to stop."""
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args

    # Shown by /server_info: this is how a trainer knows what the server can do.
    marks = [weights.LOAD_FORMAT, prefixes.MARK, *([changes.MARK] if changes.VARIABLE in os.environ else [])]
    if "--disaggregation-mode" in argv:
        pairing.install(argv[argv.index("--disaggregation-mode") + 1])
    run_server(prepare_server_args([*argv, "--custom-weight-loader", *marks]))


if __name__ == "__main__":
    main(sys.argv[1:])
