"""The trainer: backend, device, memory, precision."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from miles.core.config.group import Flag, Group

ChunkSize = Annotated[int, Field(ge=-1)]


class Training(Group):
    title = "Training Backend"

    train_backend: Annotated[str, Flag(plugin="miles.train_backends")] = "megatron"
    """The backend that trains: ``fsdp``, ``megatron``, or the name of an installed plugin."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the trainer computes. ``auto``: ``cuda`` when this machine has an accelerator, else ``cpu``."""

    train_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the trainer's forward and backward pass. ``auto``: ``bf16`` on an accelerator, ``fp32`` on the
    CPU. The optimizer's weights are always fp32."""

    train_num_threads: NonNegativeInt = 0
    """CPU threads of one trainer process; 0: an equal share of the machine's cores."""

    qkv_format: Literal["thd", "bshd"] = "thd"
    """Layout of attention inputs: ``thd`` packs sequences without padding, ``bshd`` gives each a row of its own, padded
    to the longest of its micro-batch. ``bshd`` is for architectures that cannot be packed (recurrent state, capped
    attention scores): slower, with ``--micro-batch-size`` only, on the fsdp backend."""

    true_on_policy_mode: bool = False
    """Make the trainer's log-probabilities equal the engine's bit for bit, and end the run where they are not: the
    engine's own kernels compute them over the weights being trained, and the trainer their gradient. Takes a second
    copy of the weights. For ``--rollout-engine embedded`` and the fsdp backend."""

    train_env_vars: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the trainer's processes, as a JSON object."""

    train_memory_margin_bytes: NonNegativeInt = 1024**3
    """Accelerator memory that the trainer leaves free, in bytes: it fails by itself before it takes more."""

    enable_weights_backuper: Annotated[
        bool,
        Flag(
            spelling="--disable-weights-backuper",
            negates=True,
        ),
    ] = True
    """Keep no copies of weights in host memory, and refuse what needs one: ``--keep-old-actor``, and on the megatron
    backend a reference model or teacher, which take turns with the policy in one model."""

    custom_model_provider_path: Annotated[str | None, Flag(path=True)] = None
    """Dotted path of a function that builds the model of a stage of the megatron backend: ``(pre_process,
    post_process[, vp_stage])``. ``miles.megatron.provider.default_model`` of the same arguments gives the model to
    begin with."""

    recompute_loss_function: bool = False
    """Compute the loss again in the backward pass instead of keeping what it needs. Matters for a custom loss, whose
    intermediate results are as large as its logits; built-in losses keep little."""

    log_probs_chunk_size: ChunkSize = -1
    """Tokens per chunk when log-probabilities are computed, which bounds the memory of logits. ``-1``: chosen by the
    backend."""

    keep_old_actor: bool = False
    """Keep copies, in host memory, of the weights that engines have and of those they had before, and compute the old
    log-probabilities of each token with the weights that made it. For asynchronous training and partial rollouts."""

    update_weight_buffer_size: PositiveInt = 512 * 1024**2
    """Bytes of weights sent to the engines at a time."""

    update_weight_transport: Annotated[str, Flag(plugin="miles.weight_transports")] = "auto"
    """How weights reach the engines: ``shm`` (shared memory of one machine), ``broadcast`` (a process group: gloo, or
    NCCL among accelerators), ``disk`` (a directory that all of them see), or a plugin. ``auto``: ``shm`` when every
    engine is on this machine and reads it, else ``broadcast``."""

    update_weight_delta: bool = False
    """Send only the elements that changed since the last update, bit for bit, over any transport. Takes host memory for
    a copy of the weights, and in each process of an SGLang server for another one. An engine that holds another version
    than the copy gets everything."""

    update_weight_probe_interval: NonNegativeInt = 8
    """Weight updates from one comparison to the next of the engines' and the trainer's log-probabilities of a fixed
    prompt, beginning with the first update; a difference that rounding does not explain ends the run. 0: never. Done
    with ``--rollout-temperature 1`` only, at which engines score prompts. Checksums of what engines hold are compared
    at every update."""

    pause_generation_mode: Literal["retract", "abort", "in_place"] = "retract"
    """What happens to responses in generation when weights are updated. ``retract``: they go on with the new weights,
    their keys and values computed anew. ``in_place``: they go on with the keys and values of the old weights.
    ``abort``: they end."""

    async_training: bool = False
    """Train on one rollout while the next is generated, with weights that are one rollout older. ``miles train-async``
    sets it, and so does a rollout function that generates all the time (``fully_async``)."""

    update_weights_interval: PositiveInt = 1
    """Rollouts between two weight updates of the engines, in asynchronous training. Engines get the newest weights
    before every evaluation and with every checkpoint as well."""

    fp16: bool = False
    """Same as ``--train-dtype fp16``: half precision with a loss scale that adapts; a step whose gradient overflows is
    skipped and counted (``train/skipped``)."""

    context_parallel_size: PositiveInt = 1
    """Ranks that share every sequence, for sequences too long for one: each computes two mirrored chunks of it, and
    ``--max-tokens-per-gpu`` counts a rank's share."""

    deterministic_mode: bool = False
    """Refuse operations whose result may differ from run to run."""

    allow_model_args_mismatch: bool = False
    """Accept architecture flags that contradict the checkpoint's ``config.json``."""
