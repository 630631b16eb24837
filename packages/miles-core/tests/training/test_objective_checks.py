import pytest

from miles.core.config import Config


def problems(*flags, about):
    _, found = Config.examine(["--rollout-batch-size", "8", *flags])
    return [problem for problem in found if about in problem]


@pytest.mark.parametrize("estimator", ["grpo", "gspo", "on_policy_distillation"])
def test_a_kl_penalty_that_would_do_nothing_is_refused(estimator):
    (problem,) = problems("--kl-coef", "0.1", "--advantage-estimator", estimator, about="--kl-coef")
    assert f"--advantage-estimator {estimator}" in problem
    assert "--kl-loss-coef 0.1" in problem


def test_a_kl_penalty_that_shapes_rewards_is_accepted():
    flags = ("--kl-coef", "0.1", "--advantage-estimator", "reinforce_plus_plus", "--normalize-advantages")
    assert not problems(*flags, about="--kl-coef")


@pytest.mark.parametrize(
    ("flags", "about"),
    [
        (("--use-tis", "--use-rs", "--custom-tis-function-path", "icepop"), "cannot reject"),
        (("--use-rollout-logprobs", "--use-rs"), "--use-rs and --use-rollout-logprobs"),
        (("--use-rollout-logprobs", "--keep-old-actor"), "--keep-old-actor has no effect"),
        (("--debug-train-only", "--keep-old-actor"), "--debug-train-only has no engines"),
        (("--use-routing-replay", "--keep-old-actor"), "would record the routing of one"),
        (("--use-tis", "--tis-mode", "clip"), "--tis-mode has no effect"),
        (("--use-tis", "--rs-upper-bound", "3"), "--rs-upper-bound has no effect"),
        (("--use-tis", "--tis-clip-low", "3"), "--tis-clip-low 3.0 is above --tis-clip 2.0"),
        (("--use-rs", "--rs-lower-bound", "3", "--rs-upper-bound", "2"), "--rs-lower-bound 3.0 is above"),
    ],
)
def test_a_contradiction_is_reported(flags, about):
    assert len(problems(*flags, about=about)) == 1


@pytest.mark.parametrize(
    ("flags", "about"),
    [
        (("--use-rs", "--tis-upper-bound", "3", "--rs-veto-threshold", "1e-4"), "has no effect"),
        (("--use-tis", "--custom-tis-function-path", "mis", "--tis-level", "sequence"), "has no effect"),
        (("--use-tis", "--custom-tis-function-path", "mine.function", "--rs-level", "sequence"), "has no effect"),
    ],
)
def test_what_fits_together_is_accepted(flags, about):
    assert not problems(*flags, about=about)
