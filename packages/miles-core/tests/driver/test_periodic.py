from miles.core.driver.periodic import Schedule


def evaluations(schedule: Schedule) -> list[int]:
    return [done for done in range(schedule.num_rollout + 1) if schedule.evaluates(done)]


def saves(schedule: Schedule) -> list[int]:
    return [done for done in range(schedule.num_rollout + 1) if schedule.saves_after(done)]


def test_evaluation_comes_before_every_interval_and_at_the_end():
    assert evaluations(Schedule(num_rollout=7, eval_interval=3)) == [0, 3, 6, 7]


def test_evaluation_before_training_can_be_skipped():
    assert evaluations(Schedule(num_rollout=6, eval_interval=3, eval_before_train=False)) == [3, 6]


def test_no_interval_means_no_evaluation():
    assert evaluations(Schedule(num_rollout=6)) == []


def test_saves_every_interval_and_at_the_end():
    assert saves(Schedule(num_rollout=7, saves=True, save_interval=3)) == [3, 6, 7]


def test_saves_at_the_end_without_an_interval():
    assert saves(Schedule(num_rollout=7, saves=True)) == [7]


def test_nothing_is_saved_without_a_directory():
    assert saves(Schedule(num_rollout=7, save_interval=1)) == []


def test_epoch_ends_trigger_both():
    schedule = Schedule(num_rollout=6, per_epoch=2, eval_interval=5, saves=True, save_interval=5)
    assert evaluations(schedule) == [0, 2, 4, 5, 6]
    assert saves(schedule) == [2, 4, 5, 6]


def test_engines_get_new_weights_at_the_interval_and_wherever_a_run_may_start_again():
    schedule = Schedule(num_rollout=10, eval_interval=5, save_interval=7, saves=True, update_interval=3)
    assert [done for done in range(11) if schedule.updates_weights(done)] == [0, 3, 5, 6, 7, 9, 10]
