"""One rank of the actor on Megatron-Core."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from miles.core.driver.weights_only import starting_weights
from miles.core.flags.algorithm import Algorithm
from miles.core.flags.training import Training
from miles.core.protocols.backend import Rank, TrainReport
from miles.core.training.model import Scorer
from miles.core.training.objective_spec import ObjectiveSpec, required_inputs
from miles.core.training.old_policies import OldPolicies
from miles.core.training.state_files import Counters
from miles.core.training.tagged_weights import TaggedWeights
from miles.core.training.trainer import RolloutTrainer
from miles.core.types.batch import Floats, RolloutBatch
from miles.core.weights.adapter_form import AdapterForm
from miles.megatron import checkpoint
from miles.megatron.building import Blueprint
from miles.megatron.flags import Mtp
from miles.megatron.hooks import log_prob_hook, train_step_hook
from miles.megatron.language_model import Head
from miles.megatron.multi_token import MultiTokenLoss
from miles.megatron.parameters import local_parameters
from miles.megatron.policy import BasePolicy, MegatronPolicy, Passes, TaggedPolicy
from miles.megatron.role import MegatronRole
from miles.megatron.routing import EngineRouting, FirstPassRouting, Routing
from miles.megatron.site import PipelineRanks

if TYPE_CHECKING:
    from miles.core.config import Config

_REFERENCE, _TEACHER, _OWN = "ref", "teacher", "own"


class MegatronActor(MegatronRole):
    """Holds the model, its gradients and optimizer, the tagged weights and the training procedure."""

    _trainer: RolloutTrainer

    def __init__(self, config: Config, rank: Rank) -> None:
        super().__init__(config, rank)
        self._blueprint = Blueprint.of(config, self._site, self._source)
        self._chunks = self._blueprint.build()
        self._adapters = self._blueprint.adapters(config, self._chunks)
        self._tagged = TaggedWeights(self._tensors)
        self._ref_update_interval = config[Algorithm].ref_update_interval
        self._keep_reference(config)
        self._keep_teacher(config)
        self._blueprint.load(self._chunks, starting_weights(self._checkpoint))
        if self._adapters is not None:
            self._adapters.read()
        wrapped = self._ready()
        head, layout = self._blueprint.head(config), self._site.layout
        self._routing = _routing(config, self._blueprint)
        self._multi_token = self._multi_token_loss(config[Mtp], head)
        passes = Passes(
            wrapped,
            head,
            layout,
            routing=self._routing,
            before_scoring=log_prob_hook(config, ""),
            multi_token=self._multi_token,
        )
        scoring = Passes(wrapped, head, layout, before_scoring=log_prob_hook(config, "ref_"))
        # Like a teacher in an engine, this one answers at temperature 1.
        teaching = Passes(wrapped, self._blueprint.head(config, temperature=1.0), layout)
        self._step_hook = train_step_hook(config)
        policy = MegatronPolicy(passes, self._updater, self._before_step if self._step_hook is not None else None)
        # What training does not change is the same in all of them.
        self._kept = self._tagged if self._adapters is None else TaggedWeights(self._adapters.tensors)
        self._old_policies = OldPolicies(self._kept, policy) if config[Training].keep_old_actor else None
        self._trainer = RolloutTrainer(
            config,
            policy,
            reference=self._reference(scoring),
            ranks=PipelineRanks(),
            device=self._site.device,
            old_policies=self._old_policies,
            teacher=TaggedPolicy(teaching, self._tagged, _TEACHER) if _TEACHER in self._tagged else None,
        )

    def _multi_token_loss(self, flags: Mtp, head: Head) -> MultiTokenLoss | None:
        if not flags.enable_mtp_training or flags.mtp_num_layers is None:
            return None
        return MultiTokenLoss(
            head, layers=flags.mtp_num_layers, factor=flags.mtp_loss_scaling_factor, device=self._site.device
        )

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors = {parameter.name: parameter.tensor for parameter in local_parameters(self._chunks)}
        return tensors if self._adapters is None else tensors | self._adapters.tensors()

    def _reference(self, passes: Passes) -> Scorer | None:
        """The reference's weights in turn with the policy's; or the policy without its adapters."""
        if _REFERENCE in self._tagged:
            return TaggedPolicy(passes, self._tagged, _REFERENCE)
        return None if self._adapters is None else BasePolicy(passes, self._adapters)

    def _keep_reference(self, config: Config) -> None:
        """Keep the reference's weights, if the objective needs them and they are not those under the adapters."""
        source = Path(self._checkpoint.ref_load or self._source)
        under_adapters = self._adapters is not None and source == self._source and self._ref_update_interval is None
        if required_inputs(ObjectiveSpec.from_flags(config)).ref_logp and not under_adapters:
            self._read_reference(source, self._checkpoint.ref_ckpt_step)

    def _read_reference(self, source: Path, step: int | None) -> None:
        """Keep the weights at ``source``: a model's, or those of another run's adapters over the same model."""
        state = checkpoint.resolve(source, step) if checkpoint.is_torch_dist(source) else None
        if self._adapters is None or state is None or not checkpoint.holds_adapters(state):
            self._blueprint.load(self._chunks, source, step)
            self._tagged.keep(_REFERENCE)
            return
        self._blueprint.load(self._chunks, self._source)
        own = TaggedWeights(self._adapters.tensors)
        own.keep(_OWN)
        with own.swapped_in(_OWN):  # ends with the adapters that it began with
            checkpoint.read(state, self._chunks, None)
            self._tagged.keep(_REFERENCE)

    def _keep_teacher(self, config: Config) -> None:
        """Keep the teacher's weights, if the trainer is to score with them."""
        if config.opd_type == "megatron" and required_inputs(ObjectiveSpec.from_flags(config)).teacher_logp:
            self._blueprint.load(self._chunks, Path(config.opd_teacher_load))
            self._tagged.keep(_TEACHER)

    def train(self, batch: RolloutBatch) -> TrainReport:
        if isinstance(self._routing, FirstPassRouting):
            self._routing.forget()
        if self._step_hook is not None:
            self._step_hook.begin(batch.rollout_id)
        if self._multi_token is not None:
            self._multi_token.begin(batch)
        report = super().train(batch)
        if self._multi_token is not None:
            report = self._multi_token.told_in(report)
        interval = self._ref_update_interval
        if _REFERENCE in self._tagged and interval is not None and (batch.rollout_id + 1) % interval == 0:
            self._tagged.keep(_REFERENCE)
        return report

    def _before_step(self) -> None:
        assert self._step_hook is not None
        self._updater.settle()  # it may look at weights
        self._step_hook(self._chunks, self._updater.optimizer, self._trainer.schedule)

    def log_probs(self, batch: RolloutBatch) -> tuple[Floats, ...]:
        return self._trainer.log_probs(batch)

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._gatherer.named_weights(self._site.dtype)

    def adapter_form(self) -> AdapterForm:
        assert self._adapters is not None, "--lora-rank"
        return self._adapters.form

    def named_adapters(self) -> Iterator[tuple[str, torch.Tensor]]:
        assert self._adapters is not None, "--lora-rank"
        yield from self._adapters.named(self._site.dtype)

    def save_hf(self, directory: Path) -> None:
        super().save_hf(directory)
        if self._adapters is not None:
            self._adapters.save(self._source, directory / "adapter")

    def keep_weights(self, version: int) -> None:
        assert self._old_policies is not None, "--keep-old-actor"
        self._old_policies.keep(version)

    @property
    def _tags_of_state(self) -> list[str]:
        """The tagged weights that change while training, so that they are part of the state."""
        reference = [_REFERENCE] if _REFERENCE in self._tagged and self._ref_update_interval is not None else []
        return reference + ([] if self._old_policies is None else self._old_policies.tags)

    def _prepare_tagged(self, directory: Path) -> list[Callable[[], None]]:
        return [self._prepare_copy(directory / tag, tag) for tag in self._tags_of_state]

    def _prepare_copy(self, directory: Path, tag: str) -> Callable[[], None]:
        with self._sets_of(tag).swapped_in(tag):
            return checkpoint.prepare(directory, self._chunks, None, self._writer, copies=True)

    def _load_tagged(self, directory: Path, counters: Counters) -> None:
        if self._old_policies is not None:
            self._old_policies.expect(counters.kept_versions)
        for tag in self._tags_of_state:
            checkpoint.read(directory / tag, self._chunks, None)
            self._sets_of(tag).keep(tag)

    def _sets_of(self, tag: str) -> TaggedWeights:
        """Where the weights of ``tag`` are kept."""
        return self._tagged if tag in self._tagged else self._kept


def _routing(config: Config, blueprint: Blueprint) -> Routing | None:
    """Whose experts routers follow; None: every pass chooses its own."""
    algorithm, transformer = config[Algorithm], blueprint.transformer
    if not algorithm.use_routing_replay or transformer.num_moe_experts is None:
        return None
    if algorithm.use_rollout_routing_replay:
        return EngineRouting(transformer.moe_router_topk, transformer.sequence_parallel)
    return FirstPassRouting()
