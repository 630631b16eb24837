"""Which flag names which hook; the first form is the one to write, the others are accepted as well."""

from __future__ import annotations

from collections.abc import Mapping

from miles.core.protocols.reward import RewardFunction
from miles.core.protocols.rollout import DataSource
from miles.core.protocols.tools import ToolCallParser
from miles.core.types import hooks

HOOKS: Mapping[str, tuple[type, ...]] = {
    "rollout_function_path": (hooks.RolloutFunction, hooks.RolloutClass),
    "eval_function_path": (hooks.RolloutFunction, hooks.RolloutClass),
    "data_source_path": (DataSource,),
    "custom_generate_function_path": (hooks.GenerateFunction, hooks.LegacyGenerateFunction),
    "generate_tool_call_parser": (ToolCallParser,),
    "generate_execute_tool_function_path": (hooks.ExecuteTool,),
    "custom_agent_function_path": (hooks.Agent,),
    "custom_rm_path": (RewardFunction,),
    "dynamic_sampling_filter_path": (hooks.DynamicFilter,),
    "buffer_filter_path": (hooks.BufferFilter,),
    "rollout_sample_filter_path": (hooks.RolloutSampleFilter,),
    "rollout_all_samples_process_path": (hooks.AllSamplesProcess,),
    "custom_reward_post_process_path": (hooks.RewardPostProcess,),
    "custom_convert_samples_to_train_data_path": (hooks.ConvertSamples,),
    "custom_rollout_log_function_path": (hooks.RolloutLog,),
    "custom_eval_rollout_log_function_path": (hooks.EvalLog,),
    "rollout_data_postprocess_path": (hooks.RolloutDataPostprocess,),
    "custom_loss_function_path": (hooks.CustomLossFunction,),
    "custom_tis_function_path": (hooks.CustomCorrectionFunction,),
    "custom_pg_loss_reducer_function_path": (hooks.PgReducerFactory,),
    "custom_megatron_init_path": (hooks.MegatronInit,),
    "custom_megatron_before_log_prob_hook_path": (hooks.MegatronBeforeLogProb,),
    "custom_megatron_before_train_step_hook_path": (hooks.MegatronBeforeTrainStep,),
    "custom_model_provider_path": (hooks.ModelProvider,),
}
"""By the flag's field."""
