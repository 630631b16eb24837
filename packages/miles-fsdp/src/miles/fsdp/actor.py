"""One rank of the actor on FSDP2."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor

from miles.core.driver.checkpoint import TRACKER_FILE, actor_state
from miles.core.driver.weights_only import starting_weights
from miles.core.flags.algorithm import Algorithm
from miles.core.flags.training import Training
from miles.core.protocols.backend import Rank, TrainReport
from miles.core.protocols.scorer import EngineScorer
from miles.core.registry import Registry
from miles.core.training.objective_spec import ObjectiveSpec, required_inputs
from miles.core.training.old_policies import OldPolicies
from miles.core.training.on_policy import OnPolicyModel
from miles.core.training.state_files import Counters
from miles.core.training.tagged_weights import TaggedWeights
from miles.core.training.trainer import RolloutTrainer
from miles.core.types.batch import Floats, RolloutBatch
from miles.core.weights.adapter_form import AdapterForm
from miles.core.weights.adapter_serving import served_form
from miles.fsdp import checkpoint, export
from miles.fsdp.flags import Fsdp
from miles.fsdp.policy import BasePolicy, FrozenPolicy, Policy
from miles.fsdp.role import FsdpRole

if TYPE_CHECKING:
    from miles.core.config import Config


class FsdpActor(FsdpRole):
    """Holds model, optimizer, reference and training procedure."""

    _trainer: RolloutTrainer

    def __init__(self, config: Config, rank: Rank) -> None:
        super().__init__(config, rank)
        self._model: Policy = self._build_policy()
        self._reference = self._build_reference(config)
        self._ref_update_interval = config[Algorithm].ref_update_interval
        self._gathers_on_host = config[Fsdp].fsdp_state_dict_cpu_offload
        self._tagged = TaggedWeights(lambda: _local(self._model.named_parameters()))
        self._old_policies = OldPolicies(self._tagged, self._model) if config[Training].keep_old_actor else None
        self._teacher = self._build_teacher(config)
        self._on_policy = self._build_on_policy(config)
        self._trainer = RolloutTrainer(
            config,
            self._on_policy or self._model,
            reference=self._reference,
            ranks=self._ranks(),
            device=self._site.device,
            old_policies=self._old_policies,
            teacher=self._teacher,
        )

    def _build_policy(self) -> Policy:
        module = self._builder.build(str(starting_weights(self._checkpoint)))
        return Policy(module, self._optimizer(module), self._gradients)

    def _build_reference(self, config: Config) -> FrozenPolicy | BasePolicy | None:
        if not required_inputs(ObjectiveSpec.from_flags(config)).ref_logp:
            return None
        path, lora = self._checkpoint.ref_load or str(self._source), self._builder.lora
        if (Path(path) / TRACKER_FILE).is_file():
            return self._reference_of_run(Path(path))
        if lora is None:
            return FrozenPolicy(self._builder.build(path))
        moves = config[Algorithm].ref_update_interval is not None
        if path == str(self._source) and not moves:
            return BasePolicy(self._model.module)
        return FrozenPolicy(replace(self._builder, lora=replace(lora, path=None) if moves else None).build(path))

    def _build_teacher(self, config: Config) -> FrozenPolicy | None:
        """The teacher that the trainer holds itself: like one in an engine, it answers at temperature 1."""
        if config.opd_type != "megatron" or not required_inputs(ObjectiveSpec.from_flags(config)).teacher_logp:
            return None
        return FrozenPolicy(replace(self._builder, lora=None, temperature=1.0).build(config.opd_teacher_load))

    def _build_on_policy(self, config: Config) -> OnPolicyModel | None:
        """The model with its engine's arithmetic."""
        if not config[Training].true_on_policy_mode:
            return None
        scorer: EngineScorer = Registry("miles.engine_scorers").get(config.rollout_engine)(config)
        if self._builder.lora is not None:
            form = served_form(config, self.adapter_form(), {"in the trainer": scorer.facts()})
            if form is not None:
                return OnPolicyModel(self._model, scorer, self.named_adapters, form)
        return OnPolicyModel(self._model, scorer, self.named_weights)

    def load(self, directory: Path) -> None:
        super().load(directory)
        if self._on_policy is not None:
            self._on_policy.weights_changed()

    def _reference_of_run(self, directory: Path) -> FrozenPolicy:
        """The actor of another run, or its adapters."""
        state = actor_state(directory, self._checkpoint.ref_ckpt_step)
        reference = FrozenPolicy(self._builder.build(str(self._source)))
        parameters = reference.named_parameters()
        checkpoint.read_tensors(state, {f"model.{name}": parameter for name, parameter in parameters.items()})
        return reference

    def train(self, batch: RolloutBatch) -> TrainReport:
        report = super().train(batch)
        reference, interval = self._reference, self._ref_update_interval
        if isinstance(reference, FrozenPolicy) and interval is not None and (batch.rollout_id + 1) % interval == 0:
            reference.follow(self._model.module)
        return report

    def log_probs(self, batch: RolloutBatch) -> tuple[Floats, ...]:
        return self._trainer.log_probs(batch)

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._where_gathered(export.named_weights(self._model.whole_lm(), self._site.compute_dtype))

    def adapter_form(self) -> AdapterForm:
        assert self._builder.lora is not None, "--lora-rank"
        return export.adapter_form(self._model.whole_lm(), self._builder.lora)

    def named_adapters(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._where_gathered(export.named_adapters(self._model.whole_lm(), self._site.compute_dtype))

    def _where_gathered(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, tensor.cpu()) for name, tensor in tensors) if self._gathers_on_host else tensors

    def save_hf(self, directory: Path) -> None:
        lm = self._model.whole_lm()
        export.save_model(lm, self._site, self._source, directory)
        if self._builder.lora is not None:
            export.save_adapters(lm, self._builder.lora, self._site, self._source, directory / "adapter")

    def keep_weights(self, version: int) -> None:
        assert self._old_policies is not None, "--keep-old-actor"
        self._old_policies.keep(version)

    def _expect(self, counters: Counters) -> None:
        if self._old_policies is not None:
            self._old_policies.expect(counters.kept_versions)

    def _frozen_tensors(self) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for tag in () if self._old_policies is None else self._old_policies.tags:
            copies = _sharded(self._tagged.of(tag), self._model.named_parameters())
            tensors |= {f"{tag}.{name}": tensor for name, tensor in copies.items()}
        if not isinstance(self._reference, FrozenPolicy) or self._ref_update_interval is None:
            return tensors
        reference = self._reference.named_parameters()
        return tensors | {f"reference.{name}": tensor for name, tensor in reference.items()}

    def _move_frozen(self, device: torch.device) -> None:
        for frozen in (self._reference, self._teacher):
            if isinstance(frozen, FrozenPolicy):
                frozen.module.to(device)


def _local(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What of ``parameters`` is on this rank."""
    detached = {name: parameter.detach() for name, parameter in parameters.items()}
    return {name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in detached.items()}


def _sharded(copies: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``copies`` of this rank's parts as tensors divided like the ``parameters``."""
    return {name: _like(copies[name], parameter) for name, parameter in parameters.items()}


def _like(copy: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    if not isinstance(parameter, DTensor):
        return copy
    return DTensor.from_local(
        copy,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
