"""Rules across the core's own flags.  Each yields one sentence per mistake: the flag, its value, what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from miles.core import hardware
from miles.core.config.discover import flag_table
from miles.core.config.needs import check_needs
from miles.core.config.offloading import check_offloading
from miles.core.config.training_checks import (
    check_corrections,
    check_length_of_run,
    check_loss,
    check_micro_batches,
    check_schedule,
    check_weight_copies,
)
from miles.core.driver.checkpoint import TRACKER_FILE
from miles.core.driver.executor import choose
from miles.core.driver.weights_only import starting_weights
from miles.core.errors import PluginError
from miles.core.flags.algorithm import Algorithm
from miles.core.flags.checkpoint import Checkpoint
from miles.core.flags.cluster import Cluster
from miles.core.flags.data import Data
from miles.core.flags.debug import Debug
from miles.core.flags.hooks import Hooks
from miles.core.flags.lora import Lora
from miles.core.flags.reward import Reward
from miles.core.flags.training import Training
from miles.core.registry import Registry, is_dotted

if TYPE_CHECKING:
    from miles.core.config.config import Config


def check_plugins(config: Config) -> Iterator[str]:
    """Every plugin that is named is installed, and the package of every dotted path exists.  Imports none of them."""
    for name, spec in flag_table().flags.items():
        value, flag = getattr(config, name), spec.flag
        if value is None or flag.composed or not (flag.plugin or flag.path) or config.origin[name] == "default":
            continue
        for choice in value if isinstance(value, list) else [value]:
            if problem := _plugin_problem(choice, flag.plugin):
                yield f"{spec.spelling} {choice}: {problem}"


def check_backend(config: Config) -> Iterator[str]:
    """The training backend is installed and has nothing against the configuration."""
    name = config[Training].train_backend
    chosen = "--train-backend " + name + ("" if config.origin["train_backend"] == "flag" else " (the default)")
    try:
        backend = Registry("miles.train_backends").get(name)()
    except PluginError as error:
        yield f"{chosen}: {error}"
        return
    yield from backend.check(config)


def check_rollout_role(config: Config) -> Iterator[str]:
    """The package that makes rollouts is installed."""
    del config
    try:
        Registry("miles.roles").find("rollout")
    except PluginError as error:
        yield str(error)


def check_cluster(config: Config) -> Iterator[str]:
    """There are as many accelerators and processes as the roles take, and an executor that can carry them."""
    cluster = config[Cluster]
    ranks = cluster.actor_num_nodes * cluster.actor_num_gpus_per_node
    if cluster.actor_num_gpus_per_node > cluster.num_gpus_per_node and config[Training].device == "cuda":
        yield (
            f"--actor-num-gpus-per-node {cluster.actor_num_gpus_per_node} is more than --num-gpus-per-node "
            f"{cluster.num_gpus_per_node}, which is what a machine has"
        )
    if cluster.colocate and cluster.rollout_num_gpus != ranks:
        yield (
            f"--rollout-num-gpus {cluster.rollout_num_gpus} contradicts --colocate, which generates on the {ranks} "
            "accelerators of the trainer. Leave --rollout-num-gpus out"
        )
    critics = _num_critics(cluster) if config[Algorithm].uses_critic else 0
    if cluster.executor == "local" and critics > 1 and ranks == 1:
        yield (
            f"--executor local runs one critic rank, but --critic-num-nodes {cluster.critic_num_nodes} x "
            f"--critic-num-gpus-per-node {cluster.critic_num_gpus_per_node} = {critics}. Use --executor ray, or one of "
            "each"
        )
    if cluster.executor == "local" and ranks > 1:
        yield (
            f"--executor local runs one trainer rank, but --actor-num-nodes {cluster.actor_num_nodes} x "
            f"--actor-num-gpus-per-node {cluster.actor_num_gpus_per_node} = {ranks}. Use --executor ray, or one of each"
        )
    if cluster.executor == "local" and cluster.ray_address is not None:
        yield f"--ray-address {cluster.ray_address} contradicts --executor local. Leave one of them out"
    several = max(ranks, critics) > 1
    needs_ray = choose(cluster) == "ray"
    if not needs_ray and config[Training].train_env_vars:
        yield (
            "--train-env-vars: the trainer of a local run is the process that was started. Set the variables where you "
            "start it, or use --executor ray"
        )
    if needs_ray and not hardware.is_installed("ray"):
        asked = f"a trainer of {max(ranks, critics)} ranks" if several else "--executor ray or --ray-address"
        yield f"{asked} needs Ray, which is not installed: pip install 'miles-core[ray]'"


def check_engine_nodes(config: Config) -> Iterator[str]:
    """An engine lies on one machine, or on whole ones; so do those that share the trainer's accelerators."""
    cluster = config[Cluster]
    per_engine, per_node = cluster.rollout_num_gpus_per_engine, cluster.num_gpus_per_node
    if config[Training].device != "cuda":
        return
    if per_engine > per_node and per_engine % per_node:
        yield (
            f"--rollout-num-gpus-per-engine {per_engine} is more than --num-gpus-per-node {per_node}, and no multiple "
            "of it: an engine on several machines has all of each"
        )
    if per_engine > per_node and choose(cluster) == "local":
        yield (
            f"--rollout-num-gpus-per-engine {per_engine} is more than --num-gpus-per-node {per_node}: an engine on "
            "several machines needs a Ray cluster of them. Give its --ray-address"
        )
    per_ranks = cluster.actor_num_gpus_per_node
    if cluster.colocate and cluster.actor_num_nodes > 1 and per_ranks % per_engine and per_engine % per_ranks:
        yield (
            f"--colocate: engines of --rollout-num-gpus-per-engine {per_engine} do not fit on the "
            f"--actor-num-gpus-per-node {per_ranks} accelerators of a node. Let one be a multiple of the other"
        )


def _num_critics(cluster: Cluster) -> int:
    return cluster.critic_num_nodes * cluster.critic_num_gpus_per_node


def check_async(config: Config) -> Iterator[str]:
    """Training and generation that run at the same time have accelerators of their own."""
    if not config[Training].async_training:
        return
    if config[Cluster].colocate:
        yield (
            "--colocate lets trainer and engines take turns on the same accelerators, but asynchronous training runs "
            "both at once. Use `miles train`, or give the engines accelerators of their own: --rollout-num-gpus"
        )
    algorithm = config[Algorithm]
    corrected = algorithm.use_rollout_logprobs or algorithm.use_tis or config[Training].keep_old_actor
    if algorithm.advantage_estimator == "ppo" and not corrected:
        yield (
            "--advantage-estimator ppo in asynchronous training needs the log-probabilities of the policy that "
            "generated: give --use-rollout-logprobs, --use-tis or --keep-old-actor"
        )
    if config[Debug].debug_rollout_only or config[Debug].debug_train_only:
        yield "asynchronous training needs both halves of a run; with one of them, use `miles train`"


def check_device(config: Config) -> Iterator[str]:
    """The device exists, on this machine at least when no other is in play."""
    cluster, device = config[Cluster], config[Training].device
    if device == "cpu" and cluster.distributed_backend == "nccl":
        yield "--distributed-backend nccl needs accelerators. Use gloo with --device cpu"
    if device != "cuda" or cluster.ray_address is not None:
        return
    present = hardware.num_accelerators()
    trainer = cluster.actor_num_nodes * cluster.actor_num_gpus_per_node
    if config[Algorithm].uses_critic and cluster.executor != "local" and max(trainer, _num_critics(cluster)) > 1:
        trainer += _num_critics(cluster)  # one process trains both where there is one rank of each
    generating = 0 if cluster.colocate else cluster.rollout_num_gpus or 0
    if present == 0:
        why = (
            "the installed torch is a CPU build" if hardware.torch_is_cpu_build() else "this machine has no accelerator"
        )
        yield f"--device cuda: {why}. Use --device cpu"
    elif cluster.actor_num_nodes == 1 and trainer + generating > present:
        yield (
            f"{trainer} accelerators for training and {generating} more for rollout are wanted, and {present} can be "
            "used. Lower --actor-num-gpus-per-node or --rollout-num-gpus, or share them with --colocate"
        )


def check_halves(config: Config) -> Iterator[str]:
    """A run has at least one half, and a trainer without engines has samples."""
    debug = config[Debug]
    if debug.debug_rollout_only and debug.debug_train_only:
        both = "--debug-train-only" if debug.load_debug_rollout_data is None else "--load-debug-rollout-data"
        yield f"--debug-rollout-only and {both} exclude each other: nothing would be left of the run"
    elif debug.debug_train_only and debug.load_debug_rollout_data is None and config[Algorithm].loss_type != "sft_loss":
        yield "--debug-train-only needs --load-debug-rollout-data: the samples to train on"


_ROLLOUT = ("rollout_id",)
_STEP = ("role", "rollout_id", "step_id")
_PATTERNS = {
    "save_hf": _ROLLOUT,
    "save_debug_rollout_data": _ROLLOUT,
    "load_debug_rollout_data": _ROLLOUT,
    "save_debug_train_data": ("rollout_id", "rank"),
    "ci_save_grad_norm": _STEP,
    "ci_load_grad_norm": _STEP,
}
"""What is filled into each name."""


def check_patterns(config: Config) -> Iterator[str]:
    """Names of files and directories that are filled in for every rollout can be, and do not overwrite each other."""
    for name, filled_in in _PATTERNS.items():
        pattern, spelling = getattr(config, name) or "", flag_table().flags[name].spelling
        try:
            pattern.format(**dict.fromkeys(filled_in, 0))
        except (LookupError, ValueError):
            names = ", ".join(f"{{{key}}}" for key in filled_in)
            verb = "is" if len(filled_in) == 1 else "are"
            yield f"{spelling} {pattern}: only {names} {verb} filled in, and braces that stay are doubled: {{{{ }}}}"


def check_recorders(config: Config) -> Iterator[str]:
    """Profiles and memory histories have a place to go, and something to record."""
    debug = config[Debug]
    if debug.use_pytorch_profiler and debug.profile_dir is None and config[Checkpoint].save is None:
        yield "--use-pytorch-profiler needs --profile-dir, or --save, in whose directory the traces go"
    if debug.use_pytorch_profiler and debug.profile_step_end <= debug.profile_step_start:
        yield (
            f"--profile-step-end {debug.profile_step_end} is not after --profile-step-start {debug.profile_step_start}:"
            " no rollout would be profiled"
        )
    if not debug.record_memory_history:
        return
    if debug.memory_recorder == "torch" and config[Training].device == "cpu":
        yield (
            "--record-memory-history records the allocator of an accelerator, and the trainer uses --device cpu. "
            "There, use --memory-recorder memray"
        )
    if debug.memory_recorder == "memray" and not hardware.is_installed("memray"):
        yield "--memory-recorder memray needs memray, which is not installed: pip install memray"


def check_integration(config: Config) -> Iterator[str]:
    """A metric that is checked has a threshold, and is computed."""
    hooks = config[Hooks]
    if (hooks.ci_metric_checker_key is None) != (hooks.ci_metric_checker_threshold is None):
        yield "--ci-metric-checker-key and --ci-metric-checker-threshold go together: give both or none"
    evaluated_every = getattr(config, "eval_interval", None)  # a flag of miles-rollout, which may be missing
    if hooks.ci_metric_checker_key is not None and evaluated_every is None:
        yield (
            f"--ci-metric-checker-key {hooks.ci_metric_checker_key} looks at evaluations, and there are none. Give "
            "--eval-interval"
        )


def check_rewards(config: Config) -> Iterator[str]:
    """Rewards that are asked for can be given."""
    reward = config[Reward]
    if reward.rm_type is None and reward.custom_rm_path is None:
        return
    spelling = "--rm-type" if reward.custom_rm_path is None else "--custom-rm-path"
    try:
        yield from Registry("miles.reward_dispatchers").get("default").check(config)
    except PluginError as error:
        yield f"{spelling} {reward.custom_rm_path or reward.rm_type}: {error}"


def check_model_files(config: Config) -> Iterator[str]:
    """The checkpoints that a run starts from are there."""
    checkpoint = config[Checkpoint]
    if checkpoint.hf_checkpoint is None:
        yield "--hf-checkpoint is required: the directory of the model in Hugging Face format"
    else:
        yield from _check_hf_directory("--hf-checkpoint", checkpoint.hf_checkpoint)
    yield from _check_reference(checkpoint, inherited=config.origin["ref_load"] == "inherited")
    if config[Algorithm].uses_critic and checkpoint.critic_load not in (None, checkpoint.load):
        yield from _check_critic_directory(str(checkpoint.critic_load))
    if checkpoint.load is not None and checkpoint.load != checkpoint.save and not Path(checkpoint.load).is_dir():
        yield (
            f"--load {checkpoint.load}: there is no such directory. Name a run directory that holds a checkpoint, or "
            "leave --load out to start from --hf-checkpoint"
        )
    if config[Lora].lora_rank and starting_weights(checkpoint) != Path(checkpoint.hf_checkpoint or ""):
        yield (
            f"--load {checkpoint.load} holds a whole model, and --lora-rank trains adapters on the one that engines "
            "have too. Give that model as --hf-checkpoint"
        )


def check_prompt_data(config: Config) -> Iterator[str]:
    """There are prompts."""
    data = config[Data]
    own_source = config.origin["data_source_path"] != "default"
    if not data.rollout_global_dataset or config[Debug].load_debug_rollout_data is not None:
        return
    if data.prompt_data is None:
        if not own_source:
            yield "--prompt-data is required: a JSONL or Parquet file of prompts"
        return
    for part in data.prompt_data.split(","):
        path = part.strip().rpartition("@[")[0] if part.strip().endswith("]") else part.strip()
        if not own_source and "://" not in path and not Path(path).is_file():
            yield f"--prompt-data {part.strip()}: there is no such file"


def _check_reference(checkpoint: Checkpoint, *, inherited: bool) -> Iterator[str]:
    """``--ref-load`` has a model, and the step that is asked for."""
    path, step = checkpoint.ref_load, checkpoint.ref_ckpt_step
    if path is not None and (Path(path) / TRACKER_FILE).is_file():
        if step is not None and not (Path(path) / f"iter_{step:07d}").is_dir():
            steps = sorted(int(found.name.removeprefix("iter_")) for found in Path(path).glob("iter_" + "[0-9]" * 7))
            yield (
                f"--ref-ckpt-step {step}: --ref-load {path} has no iter_{step:07d}, it has the checkpoints "
                f"{', '.join(map(str, steps)) or '(none)'}"
            )
        return
    if path is not None and not inherited:
        yield from _check_hf_directory("--ref-load", path)
    if step is not None:
        yield (
            f"--ref-ckpt-step {step} chooses among the checkpoints of a run directory, and --ref-load "
            f"{path} is none: it has no {TRACKER_FILE}. Name one, or leave --ref-ckpt-step out"
        )


def _check_critic_directory(path: str) -> Iterator[str]:
    if not any((Path(path) / name).is_file() for name in ("config.json", TRACKER_FILE)):
        yield (
            f"--critic-load {path}: expected a run directory with a checkpoint, or a model in Hugging Face format, "
            "like --critic-save writes"
        )


def _check_hf_directory(flag: str, path: str) -> Iterator[str]:
    if not Path(path).is_dir():
        yield f"{flag} {path}: there is no such directory; expected a checkpoint in Hugging Face format"
    elif not (Path(path) / "config.json").is_file():
        yield f"{flag} {path}: the directory holds no config.json; expected a checkpoint in Hugging Face format" + (
            f". It is one of the checkpoints of {Path(path).parent}: name that" if _is_of_run(Path(path)) else ""
        )


def _is_of_run(directory: Path) -> bool:
    """Whether it is what a tracker file beside it tells about."""
    return (directory.parent / TRACKER_FILE).is_file()


def _plugin_problem(choice: str, group: str | None) -> str | None:
    if group is not None:
        try:
            if Registry(group).find(choice) is not None:
                return None
        except PluginError as error:
            return str(error)
    if not is_dotted(choice):
        return None if group is not None else "expected a dotted path to an object, like package.module.name"
    package = choice.partition(":")[0].partition(".")[0]
    return None if hardware.is_installed(package) else f"there is no package {package!r} on the Python path"


CHECKS: tuple[Callable[[Config], Iterator[str]], ...] = (
    check_plugins,
    check_backend,
    check_rollout_role,
    check_cluster,
    check_engine_nodes,
    check_weight_copies,
    check_async,
    check_offloading,
    check_device,
    check_loss,
    check_corrections,
    check_schedule,
    check_length_of_run,
    check_micro_batches,
    check_halves,
    check_patterns,
    check_recorders,
    check_integration,
    check_rewards,
    check_model_files,
    check_prompt_data,
    check_needs,
)
