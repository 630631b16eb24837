from miles.core.config import Config
from miles.core.driver import announce
from miles.core.driver.checkpoint import Checkpoint, DriverState
from miles.core.run_directory import RunDirectory


def test_plan_names_place_model_batch_equation_and_length(tmp_path):
    config = Config.of(
        hf_checkpoint="model", rollout_batch_size=32, n_samples_per_prompt=8, num_steps_per_rollout=2, num_rollout=60,
        eval_interval=10, save=str(tmp_path), save_interval=20, train_backend="fsdp", actor_num_gpus_per_node=1,
        device="cpu",
    )  # fmt: skip
    text = announce.plan(config, RunDirectory(tmp_path), None)
    assert f"run     {tmp_path}\n" in text
    assert "model   model, trained by fsdp on cpu, 1 rank in this process" in text
    assert "32 prompts x 8 samples = 2 optimizer steps x 128" in text
    assert "60 rollouts, evaluated every 10, saved every 20" in text


def test_plan_counts_the_ranks_of_a_critic(tmp_path):
    config = Config.of(
        advantage_estimator="ppo", num_rollout=1, actor_num_gpus_per_node=1, critic_num_gpus_per_node=2, device="cpu"
    )
    assert "1 rank and a critic of 2 ranks under Ray" in announce.plan(config, RunDirectory(tmp_path), None)


def test_plan_says_where_a_run_is_continued(tmp_path):
    resumed = Checkpoint(tmp_path / "iter_0000007", DriverState(7, 0))
    assert "continued after rollout 7" in announce.plan(Config.of(num_rollout=9), RunDirectory(tmp_path), resumed)


def test_plan_says_with_which_weights_a_run_begins(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    config = Config.of(hf_checkpoint="model", load=str(tmp_path), num_rollout=9)
    told = f"model with the weights of {tmp_path}, "
    assert told in announce.plan(config, RunDirectory(tmp_path), None)
    resumed = Checkpoint(tmp_path / "iter_0000007", DriverState(7, 0))
    assert told not in announce.plan(config, RunDirectory(tmp_path), resumed)


def test_changes_list_what_differs_from_the_last_start():
    before = {"lr": 1e-6, "rm_type": "math", "tracker": []}
    assert announce.changes(before, {"lr": 2e-6, "rm_type": "math", "tracker": ()}) == ["lr 1e-06 -> 2e-06"]


def test_new_run_has_no_changes():
    assert announce.changes({}, {"lr": 1.0}) == []
