"""Every flag of the sections that a trainer lives by has a test that sets it and sees what it changes.

Flags of the algorithm and the optimizer are in the table of ``miles-fsdp/tests/test_flags_have_effect.py``, which
trains with and without each of them.  The others are named here with the test that shows their effect.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from miles.core.config.discover import flag_table

ROOT = Path(__file__).parents[2]
TABLE = "packages/miles-fsdp/tests/test_flags_have_effect.py"
SECTIONS = (
    "Training Backend",
    "Algorithm and RL Arguments",
    "Optimizer",
    "Data Arguments",
    "Checkpointing and Resuming",
    "FSDP Specific Arguments",
    "LoRA Arguments",
    "Debug and Profiling",
)

# Folder of tests -> test -> the flags whose effect it shows.
SHOWN_BY = {
    "packages/miles-core/tests/config/": {
        "test_batch.py::test_three_knobs_give_the_fourth_and_four_are_accepted": "rollout_batch_size "
        "n_samples_per_prompt num_steps_per_rollout global_batch_size",
        "test_checks.py::test_host_memory_without_copies_of_weights_is_promised_or_refused": "enable_weights_backuper",
        "test_derive.py::test_auto_is_replaced_by_what_the_machine_has": "device",
        "test_derive.py::test_dump_details_names_the_dump_unless_it_is_named": "dump_details",
        "test_derive.py::test_loaded_samples_replace_the_engines": "debug_train_only",
        "test_derive.py::test_the_warm_up_has_two_names": "warmup_ratio",
    },
    "packages/miles-core/tests/driver/": {
        "test_actor_critic.py::test_a_checkpoint_holds_both_and_gives_both_back": "critic_save",
        "test_actor_critic.py::test_a_critic_goes_on_from_another_run": "critic_load",
        "test_actor_critic.py::test_on_the_first_rollouts_the_critic_trains_alone": "num_critic_only_steps",
        "test_job.py::test_a_broken_checkpoint_is_skipped_only_where_that_is_wanted": "skip_broken_checkpoints",
        "test_job.py::test_a_run_without_a_trainer_only_generates": "debug_rollout_only num_rollout",
        "test_job.py::test_asynchronous_training_generates_the_next_rollout_meanwhile": "async_training",
        "test_job.py::test_length_in_epochs_is_known_to_the_trainer_before_it_starts": "num_epoch",
        "test_job.py::test_so_many_checkpoints_are_kept": "save_keep_last",
        "test_job.py::test_weights_are_updated_at_the_interval_and_at_the_end": "update_weights_interval",
        "test_periodic.py::test_saves_every_interval_and_at_the_end": "save_interval",
        "test_resume.py::test_load_of_another_run_is_where_a_new_run_starts_with_metrics_of_its_own": "load",
        "test_resume.py::test_start_rollout_id_says_where_a_run_begins_and_not_where_it_goes_on": "start_rollout_id",
        "test_worker.py::test_a_rank_that_takes_long_is_told_on": "watchdog_timeout_s",
        "test_worker.py::test_adapters_go_to_engines_that_add_them_themselves": "lora_serving",
        "test_worker.py::test_engines_are_probed_at_the_interval": "update_weight_probe_interval",
        "test_worker.py::test_the_first_update_is_checked_where_that_is_wanted": "check_weight_update_equal",
        "test_worker.py::test_the_trainer_has_as_many_threads_as_it_is_given": "train_num_threads",
    },
    "packages/miles-core/tests/training/": {
        "test_debugging.py::test_memray_records_the_rollouts_that_were_asked_for": "record_memory_history "
        "memory_snapshot_path memory_snapshot_dir memory_snapshot_num_steps memory_recorder",
        "test_debugging.py::test_parts_are_profiled_apart": "profile_target profile_dir",
        "test_debugging.py::test_rollouts_are_profiled_between_start_and_end": "use_pytorch_profiler "
        "profile_step_start profile_step_end",
        "test_debugging.py::test_what_was_trained_on_is_written_sample_by_sample": "save_debug_train_data",
        "test_settings.py::test_the_tokens_of_ranks_are_balanced_where_that_is_asked_for": "balance_data",
        "test_settings.py::test_the_token_cap_counts_only_with_dynamic_batches": "use_dynamic_batch_size "
        "max_tokens_per_gpu micro_batch_size",
        "test_trainer.py::test_a_step_that_is_not_finite_can_be_skipped": "nonfinite_step",
        "test_trainer.py::test_log_probabilities_have_a_cap_of_their_own": "log_probs_max_tokens_per_gpu",
    },
    "packages/miles-core/tests/weights/": {
        "test_sender_flags.py::test_generation_is_paused_as_the_flag_says": "pause_generation_mode",
        "test_sender_flags.py::test_the_transport_is_the_one_that_is_named": "update_weight_transport",
        "test_sender_flags.py::test_weights_travel_in_pieces_of_the_buffer_size": "update_weight_buffer_size",
    },
    "packages/miles-fsdp/tests/": {
        "test_actor.py::test_a_custom_loss_can_be_computed_again_in_the_backward_pass": "recompute_loss_function",
        "test_actor.py::test_deterministic_mode_refuses_operations_without_a_fixed_order": "deterministic_mode",
        "test_actor.py::test_gradient_checkpointing_changes_nothing_but_memory": "gradient_checkpointing",
        "test_building.py::test_log_probabilities_are_computed_in_chunks_of_that_many_tokens": "log_probs_chunk_size",
        "test_building.py::test_tensors_in_host_memory_have_a_library_beside_the_accelerators": "fsdp_cpu_backend",
        "test_building.py::test_the_margin_of_an_accelerators_memory_is_left_free": "train_memory_margin_bytes",
        "test_checkpoint.py::test_a_checkpoint_of_another_run_is_a_reference": "ref_load ref_ckpt_step",
        "test_checkpoint.py::test_another_schedule_than_the_checkpoints_is_told_unless_it_is_meant": (
            "override_lr_scheduler"
        ),
        "test_checkpoint.py::test_optimizer_state_can_be_left_out_and_then_is_not_missed_silently": "no_save_optim",
        "test_checkpoint.py::test_the_schedule_can_come_from_the_checkpoint": "use_checkpoint_lr_scheduler",
        "test_checkpoint.py::test_what_is_written_beside_training_is_the_state_at_its_beginning": "async_save",
        "test_export.py::test_an_export_can_be_trained_further": "hf_checkpoint save_hf",
        "test_families.py::test_packed_attention_is_transformers_attention": "attn_implementation",
        "test_invariance.py::test_more_ranks_than_tokens_of_a_sample": "context_parallel_size",
        "test_layout.py::test_filled_rows_train_alike": "data_pad_size_multiplier",
        "test_layout.py::test_rows_of_single_samples_train_alike": "qkv_format",
        "test_lora.py::test_an_adapter_goes_out_and_in_in_the_format_of_peft": "lora_rank lora_alpha exclude_modules "
        "lora_adapter_path",
        "test_lora.py::test_only_adapters_are_trained_and_engines_get_them_added": "target_modules",
        "test_precision.py::test_fp16_trains_like_fp32_to_its_precision": "fp16",
        "test_precision.py::test_weights_in_host_memory_train_alike": "fsdp_cpu_offload fsdp_state_dict_cpu_offload",
        "test_ranks.py::test_bfloat16_keeps_its_master_weights_in_fp32": "train_dtype",
        "test_ranks.py::test_replicas_of_sharded_models_train_like_one": "dp_replicate_size",
    },
    "packages/miles-megatron/tests/": {
        "test_hooks.py::test_a_contradiction_can_be_meant": "allow_model_args_mismatch",
        "test_hooks.py::test_flags_that_contradict_the_checkpoint_are_named": "model_name",
        "test_parallelism.py::test_fsdp_comes_to_the_same": "train_backend",
        "test_provider.py::test_a_provider_may_change_the_model_as_it_would_be": "custom_model_provider_path",
        "test_routing.py::test_the_engines_experts_change_what_the_trainer_computes": "use_rollout_routing_replay",
        "test_routing.py::test_the_first_passs_experts_are_those_of_the_scores": "use_routing_replay",
    },
    "packages/miles-rollout/tests/": {
        "test_convert.py::test_rewards_are_relative_to_the_group": "grpo_std_normalization rewards_normalization",
        "test_data_source.py::test_flags_say_how_rows_become_prompts": "input_key label_key metadata_key tool_key "
        "apply_chat_template apply_chat_template_kwargs multimodal_keys",
        "test_data_source.py::test_groups_hold_fresh_samples_with_indices_that_count_up": "prompt_data",
        "test_data_source.py::test_without_prompt_data_samples_are_blank": "rollout_global_dataset",
        "test_manager.py::test_a_data_source_of_the_users_saves_and_loads_itself": "data_source_path",
        "test_manager.py::test_a_replay_trains_on_the_files_of_another_run": "load_debug_rollout_data "
        "load_debug_rollout_data_subsample",
        "test_manager.py::test_debug_data_is_a_second_copy": "save_debug_rollout_data",
    },
    "tests/e2e/": {
        "test_async.py::test_old_log_probabilities_are_those_of_the_weights_that_generated": "keep_old_actor",
        "test_lost_ranks.py::test_a_killed_rank_is_named_and_the_run_goes_on_bit_for_bit": "train_env_vars save",
        "test_true_on_policy.py::test_trainer_and_engine_differ_by_exactly_nothing": "true_on_policy_mode",
        "test_weight_transports.py::test_small_steps_in_half_precision_change_little": "update_weight_delta",
    },
}

TESTS = {folder + test: flags.split() for folder, tests in SHOWN_BY.items() for test, flags in tests.items()}
SHOWN = {flag for flags in TESTS.values() for flag in flags}


@cache
def tree(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def trained_with_and_without() -> set[str]:
    """Keys of ``EFFECTS`` in the table."""
    assigned = {node.targets[0].id: node.value for node in tree(TABLE).body if isinstance(node, ast.Assign)}
    return set(ast.literal_eval(ast.List(list(assigned["EFFECTS"].keys), ast.Load())))


@pytest.mark.parametrize("test", TESTS)
def test_the_test_is_there(test: str) -> None:
    path, name = test.split("::")
    defined = (node for node in tree(path).body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    assert name in {node.name for node in defined}


@pytest.mark.parametrize("test", TESTS)
def test_the_test_sets_the_flags(test: str) -> None:
    text = (ROOT / test.split("::")[0]).read_text(encoding="utf-8")
    specs = [flag_table().flags[name] for name in TESTS[test]]
    unset = [spec.name for spec in specs if spec.name not in text and spec.spelling not in text]
    assert not unset, "the test looks at what is behind the flag; name one that sets it"


def test_every_flag_has_one() -> None:
    flags = [spec for spec in flag_table().flags.values() if spec.group.title in SECTIONS]
    missing = {spec.name for spec in flags if spec.flag.unsupported is None} - SHOWN - trained_with_and_without()
    assert not missing, "set the flag in a test that sees what it changes, and name that test here"


def test_only_flags_are_named() -> None:
    assert set(flag_table().flags) >= SHOWN
