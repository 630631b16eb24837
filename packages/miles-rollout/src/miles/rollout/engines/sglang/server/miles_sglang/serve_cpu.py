# mypy: disable-error-code="import-not-found,no-untyped-call"
"""``python -m miles_sglang.serve_cpu ARG ...``: the same on a CPU, for tests and small experiments.

Workers are forked after the imports instead of spawned: they have everything that is installed here, and start in two
seconds instead of thirty.
"""

from __future__ import annotations

import multiprocessing
import sys

import torch.multiprocessing

from miles_sglang import standins


def main(argv: list[str]) -> None:
    """Serve until told to stop."""
    standins.install()
    # Only now can SGLang be imported, and its workers' modules are imported here for all of them.
    import sglang.srt.entrypoints.http_server
    import sglang.srt.managers.detokenizer_manager
    import sglang.srt.managers.scheduler  # noqa: F401
    from sglang.srt.arg_groups import choices
    from sglang.srt.mem_cache.pool_host import common as host_pools

    from miles_sglang import attention, sampling, serve

    choices.add_deterministic_attention_backend_choices(["torch_native"])
    choices.add_radix_supported_deterministic_attention_backend_choices(["torch_native"])
    attention.install()
    sampling.install(seed=int(argv[argv.index("--random-seed") + 1]) if "--random-seed" in argv else 0)
    host_pools._cuda_host_register = lambda *_args, **_named: None  # there is no device that memory is pinned for
    if "--disaggregation-mode" in argv:
        _transfer_ordinary_memory()
    if "--enable-lora" in argv:
        standins.install_unpinned_memory()
    _fork_workers()
    serve.main(argv)


def _transfer_ordinary_memory() -> None:
    """Let prefill servers send keys and values from where they are here, and decode servers take them there (NIXL)."""
    from sglang.srt.disaggregation.nixl import conn

    conn._normalize_kv_mem_kinds = lambda _kinds, count: ["DRAM"] * count


def _fork_workers() -> None:
    set_start_method = multiprocessing.set_start_method

    def fork(method: str | None = None, force: bool = False) -> None:
        set_start_method("fork", force=True)

    multiprocessing.set_start_method = torch.multiprocessing.set_start_method = fork


if __name__ == "__main__":
    main(sys.argv[1:])
