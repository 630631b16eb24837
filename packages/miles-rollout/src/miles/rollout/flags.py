"""Flags of generation, engines and evaluation.  Imports nothing heavy."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from miles.core.config.group import DERIVED, Flag, Group

Probability = Annotated[float, Field(gt=0, le=1)]
TopK = Annotated[int, Field(ge=-1)]


class Rollout(Group):
    title = "Rollout Management"

    rollout_function_path: Annotated[str, Flag(plugin="miles.rollouts")] = (
        "miles.rollout.sglang_rollout.generate_rollout"
    )
    """Function that makes a rollout, by name or dotted path: ``(args, rollout_id, data_source, evaluation=False)``."""

    rollout_temperature: NonNegativeFloat = 1.0
    """Sampling temperature."""

    rollout_top_p: Probability = 1.0
    """Nucleus sampling: the smallest set of tokens with at least this probability."""

    rollout_top_k: TopK = -1
    """Sample among the k most probable tokens; ``-1``: among all."""

    rollout_max_context_len: PositiveInt | None = None
    """Most tokens of prompt and response together."""

    rollout_max_prompt_len: PositiveInt | None = None
    """Most tokens of a prompt; longer prompts are left out when the data is read. Defaults to
    ``--rollout-max-context-len - 1``."""

    rollout_max_response_len: PositiveInt | None = None
    """Most tokens of a response."""

    rollout_skip_special_tokens: bool = False
    """Leave special tokens out of the response's text."""

    rollout_stop: list[str] | None = None
    """Texts that end a response."""

    rollout_stop_token_ids: list[int] | None = None
    """Token ids that end a response."""

    rollout_shuffle: bool = False
    """Shuffle the prompts, anew in every epoch."""

    rollout_seed: int = 42
    """Seed of shuffling and sampling."""

    rollout_external: bool = False
    """Use engines that already run instead of starting them."""

    rollout_external_engine_addrs: list[str] | None = None
    """Addresses (``host:port``) of the engines that already run."""

    custom_generate_function_path: Annotated[str | None, Flag(plugin="miles.generators")] = None
    """Function that generates one sample, by name or dotted path, in place of the single-turn one."""

    custom_rollout_log_function_path: Annotated[str | None, Flag(path=True)] = None
    """Dotted path of a function ``(rollout_id, args, samples, rollout_extra_metrics, rollout_time)``; a true result
    replaces the standard metrics of a rollout."""

    custom_eval_rollout_log_function_path: Annotated[str | None, Flag(path=True)] = None
    """Dotted path of a function ``(rollout_id, args, data, extra_metrics)``; a true result replaces the standard
    metrics of an evaluation."""


class Sampling(Group):
    title = "Sampling and Filtering"

    over_sampling_batch_size: Annotated[PositiveInt, Flag(inherits="rollout_batch_size")] = DERIVED
    """Prompts submitted at a time. Defaults to ``--rollout-batch-size``; more than that keeps the engines busy while
    a filter drops groups."""

    dynamic_sampling_filter_path: Annotated[str | None, Flag(plugin="miles.filters")] = None
    """Filter of finished groups, by name or dotted path: ``(args, group) -> DynamicFilterOutput``."""

    dynamic_sampling_max_rounds: PositiveInt = 16
    """Times ``--rollout-batch-size``: the prompts that may be tried for one rollout. When the filter drops too many
    of them, the run ends with a report of the reasons."""

    rollout_sample_retries: NonNegativeInt = 1
    """Times that a sample is generated again, from the start, when its generation failed. After that its group is given
    up and replaced, and counted as failed; more failed groups than a rollout has prompts end the run."""

    partial_rollout: bool = False
    """Keep what was generated when a rollout is complete, and go on with it in the next one."""

    mask_offpolicy_in_partial_rollout: bool = False
    """Train only on the tokens that the present policy generated."""

    buffer_filter_path: Annotated[str | None, Flag(plugin="miles.filters")] = None
    """Picks groups from the buffer, by name or dotted path: ``(args, rollout_id, buffer, num_samples) -> groups``.
    Defaults to the oldest."""

    rollout_sample_filter_path: Annotated[str | None, Flag(path=True)] = None
    """Dotted path of a function ``(args, groups)`` that sets ``remove_sample`` on samples that must not train."""

    rollout_all_samples_process_path: Annotated[str | None, Flag(path=True)] = None
    """Dotted path of a function ``(args, all_groups, data_source)`` that sees every group of a rollout, dropped ones
    included."""


class FullyAsync(Group):
    title = "Fully Asynchronous Rollout"

    max_weight_staleness: PositiveInt | None = None
    """Most rollouts between the oldest weights that made a token of a group and the weights that train on it. Left out,
    groups of any age are trained on."""

    async_unused_samples_handler: Literal["retry", "drop"] = "retry"
    """What becomes of groups that are older than that: ``retry`` generates them again with newer weights, ``drop``
    gives their prompts up."""

    async_max_concurrent_samples: PositiveInt | None = None
    """Samples in work at the same time, in whole groups. Defaults to one rollout's."""

    async_data_buffer_capacity_factor: NonNegativeFloat = 2.0
    """Rollouts' worth of finished groups that may wait for the trainer before generation pauses."""


class Evaluation(Group):
    title = "Evaluation Arguments"

    eval_interval: PositiveInt | None = None
    """Rollouts between two evaluations."""

    eval_prompt_data: list[str] | None = None
    """Pairs of a name and a prompt file: ``aime aime.jsonl gsm8k gsm8k.parquet``."""

    eval_config: str | None = None
    """YAML or JSON file that describes the evaluation data sets and their settings. Wins over
    ``--eval-prompt-data``."""

    eval_async: bool = False
    """Evaluate beside generation and training, on the same engines and one fixed version of the weights: only the next
    weight update, or the next checkpoint, waits for the evaluation to end."""

    skip_eval_before_train: bool = False
    """Do not evaluate before the first rollout."""

    n_samples_per_eval_prompt: PositiveInt = 1
    """Responses per evaluation prompt."""

    eval_temperature: Annotated[NonNegativeFloat, Flag(inherits="rollout_temperature")] = DERIVED
    """Temperature of evaluation. Defaults to ``--rollout-temperature``."""

    eval_top_p: Annotated[Probability, Flag(inherits="rollout_top_p")] = DERIVED
    """Top-p of evaluation. Defaults to ``--rollout-top-p``."""

    eval_top_k: Annotated[TopK, Flag(inherits="rollout_top_k")] = DERIVED
    """Top-k of evaluation. Defaults to ``--rollout-top-k``."""

    eval_max_response_len: Annotated[PositiveInt | None, Flag(inherits="rollout_max_response_len")] = None
    """Most tokens of a response in evaluation. Defaults to ``--rollout-max-response-len``."""

    eval_max_prompt_len: Annotated[PositiveInt | None, Flag(inherits="rollout_max_prompt_len")] = None
    """Most tokens of an evaluation prompt. Defaults to ``--rollout-max-prompt-len``."""

    eval_min_new_tokens: NonNegativeInt | None = None
    """Least tokens of a response in evaluation."""

    eval_max_context_len: Annotated[PositiveInt | None, Flag(inherits="rollout_max_context_len")] = None
    """Most tokens of prompt and response in evaluation. Defaults to ``--rollout-max-context-len``."""

    eval_function_path: Annotated[str, Flag(inherits="rollout_function_path", plugin="miles.rollouts")] = DERIVED
    """Function that evaluates, by name or dotted path. Defaults to ``--rollout-function-path``."""

    eval_input_key: Annotated[str, Flag(inherits="input_key")] = DERIVED
    """Column of the prompt in evaluation data. Defaults to ``--input-key``."""

    eval_label_key: Annotated[str | None, Flag(inherits="label_key")] = None
    """Column of the ground truth in evaluation data. Defaults to ``--label-key``."""

    eval_tool_key: Annotated[str, Flag(inherits="tool_key")] = DERIVED
    """Column of tool definitions in evaluation data. Defaults to ``--tool-key``."""


class Engines(Group):
    title = "SGLang Backend Arguments"

    rollout_engine: Annotated[str, Flag(plugin="miles.engines")] = "auto"
    """Engine that generates: ``embedded``, ``sglang``, or the name of an installed plugin. ``auto``: ``sglang`` when
    it is installed and the machine has an accelerator, else ``embedded``."""

    rollout_num_engines: NonNegativeInt = DERIVED
    """Number of engines. Defaults to ``rollout_num_gpus // rollout_num_gpus_per_engine``, to 1 on a machine without
    accelerators, and to 0 when a run generates nothing."""

    engine_num_threads: NonNegativeInt = 0
    """CPU threads of one engine; 0: an equal share of its machine's cores."""

    engine_host: str | None = None
    """Address of their machine at which engines listen. Left out: 127.0.0.1, and in a Ray cluster of several machines
    each at the address of its node. Engines answer whoever reaches them, so it belongs to a network of your own."""

    sglang_python: str | None = None
    """Interpreter of the environment that has SGLang, which cannot be the trainer's when both want their own torch.
    Defaults to ``MILES_SGLANG_PYTHON``, else to the one that runs."""

    sglang_mem_fraction_static: Probability = 0.9
    """Share of an accelerator's memory that SGLang takes for weights and cache; on a CPU 0.3 unless it is given."""

    sglang_server_concurrency: PositiveInt = 512
    """Most requests in flight per engine."""

    sglang_router_ip: str | None = None
    """Address of a router that already runs. Left out, the run starts its own."""

    sglang_router_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Port of the router."""

    sglang_router_request_timeout_secs: PositiveInt = 14400
    """Seconds after which a request to the router fails."""

    sglang_options: Annotated[dict[str, Any], Flag(captures="--sglang-")] = Field(default_factory=dict)
    """Every other ``--sglang-*`` flag, passed to the engine without the prefix; those of SGLang are checked against the
    arguments of the installed server."""


class FaultTolerance(Group):
    title = "Fault Tolerance"

    use_fault_tolerance: bool = False
    """Watch the engines, and replace one that has ended or does not answer: the new one gets the trainer's weights, and
    the responses that were lost are generated again. Without it a dead engine ends the run."""

    rollout_health_check_interval: PositiveFloat = 30.0
    """Seconds between two health checks of an engine, by the router and by who replaces engines."""

    rollout_health_check_timeout: PositiveFloat = 30.0
    """Seconds an engine has to answer a health check."""

    rollout_health_check_first_wait: NonNegativeFloat = 0.0
    """Seconds from the start of an engine to its first health check with ``--use-fault-tolerance``."""

    rollout_engine_max_restarts: NonNegativeInt = 3
    """Times that an engine may be replaced within ten minutes; one more ends the run."""


class MultiTurn(Group):
    title = "Multi-Turn and Agentic Arguments"

    generate_max_turns: PositiveInt = 16
    """Most turns of the model in a conversation of the generator ``multi_turn``."""

    generate_tool_specs_path: str | None = None
    """Tool definitions in OpenAI's form: a JSON or YAML file, or the dotted path of a list. Without it the
    ``--tool-key`` column of the data has them."""

    generate_tool_call_parser: Annotated[str | None, Flag(plugin="miles.tool_parsers")] = None
    """Format in which the model writes tool calls, by name or dotted path."""

    generate_execute_tool_function_path: Annotated[str | None, Flag(path=True)] = None
    """Dotted path of the function that executes a tool: ``(name, params) -> str``, synchronous or not."""

    generate_tool_timeout: PositiveFloat = 60.0
    """Seconds that one tool call may take; then the model reads that it took too long."""

    generate_multi_samples: bool = False
    """Make a sample of every turn instead of one of the conversation."""

    custom_agent_function_path: Annotated[str | None, Flag(path=True)] = None
    """Dotted path of an agent for the generator ``agentic``: ``(base_url, prompt, request_kwargs, metadata)``, all by
    name, synchronous or not. It talks to ``{base_url}/v1/chat/completions``, which records token ids."""

    agent_timeout: PositiveFloat = 3600.0
    """Seconds that one run of the agent may take; what it had said by then is its sample."""


class RolloutBuffer(Group):
    title = "Rollout Buffer Management"

    rollout_buffer_url: str | None = None
    """Address of a rollout buffer service, which makes the trajectories: it gets ``--prompt-data`` and the router's
    address, and is asked for what is finished. Needs ``--disable-rollout-global-dataset``."""

    fetch_trajectory_retry_times: Annotated[int, Field(ge=-1)] = -1
    """Times in a row that the buffer service may fail to answer before the run ends; ``-1``: any number."""

    min_batch_collection_ratio: Probability = 1.0
    """Share of a rollout's prompts that the buffer service must have finished for training to go on."""

    rollout_task_type: str = "math"
    """Kind of task, by which a buffer service chooses what to do."""

    rollout_trim_samples: Annotated[bool, Flag(spelling="--disable-rollout-trim-samples", negates=True)] = True
    """Keep the samples of a rollout that do not fill a whole optimizer step."""

    use_dynamic_global_batch_size: bool = False
    """Take one optimizer step on however many samples a rollout has."""

    loss_mask_type: Literal["qwen", "qwen3", "distill_qwen"] = "qwen"
    """Chat format by which the tokens of an assistant are found in a conversation (SFT)."""


class Distillation(Group):
    title = "On-Policy Distillation"

    opd_type: Literal["sglang", "megatron"] = "sglang"
    """What scores the tokens of the policy. ``sglang``: an engine that serves the teacher, whatever engine that is.
    ``megatron``: the trainer, whatever its backend, which holds the teacher as a frozen model beside the policy; on the
    megatron backend its weights wait in host memory, and it has the architecture of the policy."""

    opd_teacher_load: str | None = None
    """Model of the teacher, a Hugging Face directory with the tokenizer of the policy: the run starts an engine for
    it, or the trainer loads it (``--opd-type``)."""

    opd_teacher_urls: list[str] | None = None
    """Addresses (``http://host:port``) of engines that serve the teacher already; samples are spread over them."""


GROUPS: tuple[type[Group], ...] = (
    Rollout,
    Sampling,
    FullyAsync,
    Evaluation,
    Engines,
    FaultTolerance,
    MultiTurn,
    RolloutBuffer,
    Distillation,
)
