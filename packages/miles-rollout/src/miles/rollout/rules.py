"""What contradicts what among the flags of the rollout side.  Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from miles.core import hardware
from miles.core.flags.algorithm import Algorithm
from miles.core.flags.lora import Lora
from miles.core.flags.training import Training
from miles.core.registry import Registry
from miles.rollout.derive import ENGINES, FULLY_ASYNC_ROLLOUTS, OWN_ROLLOUTS, SFT_ROLLOUTS
from miles.rollout.engine_options import engine_options
from miles.rollout.engines.sglang.adapters import adapter_obstacle
from miles.rollout.eval_datasets import check_eval_datasets
from miles.rollout.flags import (
    Distillation,
    Engines,
    Evaluation,
    FaultTolerance,
    FullyAsync,
    Rollout,
    RolloutBuffer,
    Sampling,
)

if TYPE_CHECKING:
    from miles.core.config import Config

_EVERY_ADDRESS = ("0.0.0.0", "::")


def check_lengths(config: Config) -> Iterator[str]:
    """Prompt, response and context fit into each other, and a response has an end."""
    rollout, evaluation = config[Rollout], config[Evaluation]
    for context, prompt, prefix in (
        (rollout.rollout_max_context_len, rollout.rollout_max_prompt_len, "--rollout"),
        (evaluation.eval_max_context_len, evaluation.eval_max_prompt_len, "--eval"),
    ):
        if context is not None and prompt is not None and prompt > context - 1:
            yield (
                f"{prefix}-max-prompt-len {prompt}: a prompt that fills {prefix}-max-context-len {context} leaves no "
                f"room for a response; expected at most {context - 1}"
            )
    unbounded = rollout.rollout_max_response_len is None and rollout.rollout_max_context_len is None
    if unbounded and config[Engines].rollout_num_engines and rollout.rollout_function_path not in SFT_ROLLOUTS:
        yield "--rollout-max-response-len is required: without it or --rollout-max-context-len a response may never end"


def check_sampling(config: Config) -> Iterator[str]:
    """Enough prompts are submitted to fill a rollout."""
    sampling, batch_size = config[Sampling], config.rollout_batch_size
    if sampling.over_sampling_batch_size < batch_size:
        yield (
            f"--over-sampling-batch-size {sampling.over_sampling_batch_size} is less than --rollout-batch-size "
            f"{batch_size}; expected at least as many, or leave it out"
        )
    if sampling.mask_offpolicy_in_partial_rollout and not sampling.partial_rollout:
        yield (
            "--mask-offpolicy-in-partial-rollout has no effect without --partial-rollout. Add it, or leave the first "
            "out"
        )


def check_fully_async(config: Config) -> Iterator[str]:
    """Flags of continuous generation have one, and it has nothing to give back."""
    flags, name = config[FullyAsync], config[Rollout].rollout_function_path
    if name in FULLY_ASYNC_ROLLOUTS:
        per_group, most = config.n_samples_per_prompt, flags.async_max_concurrent_samples
        if most is not None and most < per_group:
            yield f"--async-max-concurrent-samples {most} is less than one group (--n-samples-per-prompt {per_group})"
        if config[Sampling].partial_rollout:
            yield (
                f"--partial-rollout keeps what the end of a rollout cuts, but --rollout-function-path {name} cuts "
                "nothing. Leave it out"
            )
    elif name in OWN_ROLLOUTS:  # a function of the user's may read them
        for field, info in FullyAsync.model_fields.items():
            if getattr(flags, field) != info.default:
                yield f"--{field.replace('_', '-')} has no effect without --rollout-function-path fully_async"


def check_buffer_service(config: Config) -> Iterator[str]:
    """Flags of the buffer service have one, and it reads the prompts itself."""
    flags = config[RolloutBuffer]
    if flags.rollout_buffer_url is not None:
        if config.rollout_global_dataset:
            yield (
                f"--rollout-buffer-url {flags.rollout_buffer_url}: the service reads --prompt-data itself. Give "
                "--disable-rollout-global-dataset, and the length of the run as --num-rollout"
            )
        return
    for name in ("fetch_trajectory_retry_times", "min_batch_collection_ratio", "rollout_task_type"):
        own = config[Rollout].rollout_function_path in OWN_ROLLOUTS  # a function of the user's may read them
        if own and getattr(flags, name) != RolloutBuffer.model_fields[name].default:
            yield f"--{name.replace('_', '-')} has no effect without --rollout-buffer-url"


def check_evaluation(config: Config) -> Iterator[str]:
    """Data sets and interval of evaluation go together."""
    evaluation = config[Evaluation]
    yield from check_eval_datasets(config)
    for name, value in (("--eval-prompt-data", evaluation.eval_prompt_data), ("--eval-config", evaluation.eval_config)):
        if value is not None and evaluation.eval_interval is None:
            yield f"{name} has no effect without --eval-interval. Say after how many rollouts to evaluate"
    if evaluation.eval_interval is not None and config.debug_train_only:
        yield (
            f"--eval-interval {evaluation.eval_interval}: a trainer without engines (--debug-train-only, "
            "--load-debug-rollout-data) cannot evaluate. Leave --eval-interval and the data of evaluations out"
        )
    if evaluation.eval_async and config.offload_rollout:
        yield (
            "--eval-async evaluates while the trainer works, and with --offload-rollout engines have no memory then. "
            "Leave one of them out"
        )


def check_engines(config: Config) -> Iterator[str]:
    """The engine exists, there is at least one, and accelerators add up."""
    engines, gpus, per_engine = config[Engines], config.rollout_num_gpus, config.rollout_num_gpus_per_engine
    if config.device == "cuda" and gpus is None and engines.rollout_num_engines == 0 and not config.debug_train_only:
        if config.rollout_function_path not in SFT_ROLLOUTS or config.eval_interval is not None:
            yield (
                "--rollout-num-gpus is missing: say how many accelerators generate, or share the trainer's with "
                "--colocate"
            )
    elif gpus and gpus % per_engine:
        yield (
            f"--rollout-num-gpus {gpus} is no multiple of --rollout-num-gpus-per-engine {per_engine}; the rest would "
            "idle"
        )
    elif gpus and engines.rollout_num_engines not in (0, gpus // per_engine):
        yield (
            f"--rollout-num-engines {engines.rollout_num_engines} contradicts --rollout-num-gpus {gpus} / "
            f"--rollout-num-gpus-per-engine {per_engine} = {gpus // per_engine}. Leave one of them out"
        )
    own_engines = engines.rollout_num_engines and not config[Rollout].rollout_external
    if config.device == "cuda" and per_engine > config.num_gpus_per_node and engines.rollout_engine == "embedded":
        yield (
            f"--rollout-num-gpus-per-engine {per_engine} is more than --num-gpus-per-node {config.num_gpus_per_node}, "
            "and the embedded engine is one process. Use --rollout-engine sglang"
        )
    if engines.engine_host in _EVERY_ADDRESS:
        yield (
            f"--engine-host {engines.engine_host} is no address that others could send to: give the one of the "
            "machine's addresses by which router and trainers reach the engines"
        )
    drafts = engines.rollout_engine == "sglang" and "speculative_algorithm" in engine_options(config)
    if config.update_weight_delta and drafts:
        yield (
            "--update-weight-delta: SGLang loads every update into the draft of --sglang-speculative-algorithm too, "
            "and a change can be made once only. Leave one of the two out"
        )
    if own_engines and engines.rollout_engine in ENGINES:
        yield from ENGINES.get(engines.rollout_engine)().check(engine_options(config))


def check_prefill(config: Config) -> Iterator[str]:
    """Prefill servers have decode servers to work for, and nobody wants what only whole engines have."""
    count, engines = config.prefill_num_servers, config[Engines]
    if count is None:
        return
    flag = f"--prefill-num-servers {count}"
    if engines.rollout_engine == "embedded":
        yield f"{flag}: the embedded engine computes prompts and responses itself. Use --rollout-engine sglang"
    if config[Rollout].rollout_external:
        yield f"{flag} starts engines, and --rollout-external uses those that run. Leave one of them out"
    elif count >= engines.rollout_num_engines:
        yield (
            f"{flag} of {engines.rollout_num_engines} engines leaves none that decodes. Give more engines "
            "(--rollout-num-gpus, --rollout-num-engines)"
        )
    if config[Algorithm].use_rollout_routing_replay:
        yield (
            f"{flag}: a decode server does not tell which experts its prefill server chose, which "
            "--use-rollout-routing-replay needs. Leave one of them out"
        )
    continuous = config[Rollout].rollout_function_path in FULLY_ASYNC_ROLLOUTS
    if continuous and config[Training].pause_generation_mode != "in_place":
        yield (
            f"{flag}: SGLang cannot start a response anew between its two halves, and the fully_async rollout "
            "generates while weights change. Give --pause-generation-mode in_place"
        )


def check_sft(config: Config) -> Iterator[str]:
    """Supervised fine-tuning takes every conversation as it is."""
    if config.rollout_function_path in SFT_ROLLOUTS and config.n_samples_per_prompt != 1:
        yield (
            f"--n-samples-per-prompt {config.n_samples_per_prompt}: supervised fine-tuning takes every conversation "
            "once; leave it at 1"
        )


def check_external_engines(config: Config) -> Iterator[str]:
    """Engines that already run have addresses, as many as there are engines."""
    rollout, count = config[Rollout], config[Engines].rollout_num_engines
    addresses = rollout.rollout_external_engine_addrs or []
    if rollout.rollout_external and not addresses:
        yield "--rollout-external needs --rollout-external-engine-addrs: the host:port of every engine"
    if rollout.rollout_external and config[FaultTolerance].use_fault_tolerance:
        yield (
            "--use-fault-tolerance replaces engines of the run's own, and --rollout-external uses those of somebody "
            "else, who has to replace them. Leave one of them out"
        )
    if addresses and not rollout.rollout_external:
        yield "--rollout-external-engine-addrs has no effect without --rollout-external. Add it, or leave the first out"
    if rollout.rollout_external and (options := engine_options(config)):
        given = ", ".join(f"--sglang-{name.replace('_', '-')}" for name in options)
        yield f"{given} cannot change engines that already run (--rollout-external). Give it to whoever starts them"
    if rollout.rollout_external and addresses and count not in (0, len(addresses)):
        yield (
            f"--rollout-num-engines {count} contradicts the {len(addresses)} addresses of "
            "--rollout-external-engine-addrs. Leave it out"
        )


def check_router_address(config: Config) -> Iterator[str]:
    """A router that already runs has an address and a port; a port alone is where the run's own router listens."""
    engines = config[Engines]
    if engines.sglang_router_ip is not None and engines.sglang_router_port is None:
        yield f"--sglang-router-ip {engines.sglang_router_ip} needs --sglang-router-port: where the router listens"
    if engines.sglang_router_ip is None and engines.rollout_num_engines and not hardware.is_installed("miles.router"):
        yield "the router in front of the engines is in miles-router, which is not installed: pip install miles-router"


def check_adapter_serving(config: Config) -> Iterator[str]:
    """Where engines are to add the adapter, there is one, and nothing takes the model under it from them."""
    lora = config[Lora]
    if lora.lora_serving != "adapter":
        return
    if not lora.lora_rank:
        yield "--lora-serving adapter needs --lora-rank: without it the whole model is trained"
    elif config[Engines].rollout_engine == "sglang" and (obstacle := adapter_obstacle(config)) is not None:
        yield f"--lora-serving adapter with --rollout-engine sglang: {obstacle}. Leave one of the two out"


def check_true_on_policy(config: Config) -> Iterator[str]:
    """The engine's arithmetic is to be had in the trainer, and engines generate what is trained on."""
    if not config.true_on_policy_mode:
        return
    name = config[Engines].rollout_engine
    if name not in Registry("miles.engine_scorers"):
        yield (
            f"--true-on-policy-mode: the {name} engine cannot compute inside the trainer. Use --rollout-engine embedded"
        )
    if config.debug_train_only or not config[Engines].rollout_num_engines:
        yield "--true-on-policy-mode compares with an engine, and this run has none. Leave it out"


def check_teacher(config: Config) -> Iterator[str]:
    """Distillation has one teacher, and a teacher somebody to teach."""
    flags, algorithm = config[Distillation], config[Algorithm]
    distills = algorithm.use_opd or algorithm.advantage_estimator == "on_policy_distillation"
    load, urls = flags.opd_teacher_load, flags.opd_teacher_urls
    if not distills and (load is not None or urls):
        flag = "--opd-teacher-load" if load is not None else "--opd-teacher-urls"
        yield f"{flag} has no effect without --use-opd or --advantage-estimator on_policy_distillation"
    if load is not None and urls:
        yield "--opd-teacher-load and --opd-teacher-urls both name the teacher. Leave one of them out"
    if load is not None and not (Path(load) / "config.json").is_file():
        yield f"--opd-teacher-load {load}: there is no config.json; expected a checkpoint in Hugging Face format"
    if flags.opd_type == "megatron" and distills and (load is None or urls):
        yield (
            "--opd-type megatron: the trainer scores with a teacher of its own. Name it with --opd-teacher-load, and "
            "leave --opd-teacher-urls out"
        )
        return
    own = (config.custom_generate_function_path, config.custom_rm_path, config.load_debug_rollout_data)
    if algorithm.use_opd and load is None and not urls and not any(own):
        yield (
            "--use-opd needs a teacher: --opd-teacher-load starts an engine for it, --opd-teacher-urls names engines "
            "that run; or a function of yours fills in teacher_log_probs"
        )


CHECKS: tuple[Callable[[Config], Iterator[str]], ...] = (
    check_lengths,
    check_sampling,
    check_fully_async,
    check_buffer_service,
    check_evaluation,
    check_engines,
    check_prefill,
    check_sft,
    check_external_engines,
    check_router_address,
    check_teacher,
    check_true_on_policy,
    check_adapter_serving,
)
