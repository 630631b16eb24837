import pytest

from miles.core.config import Config


def problems(*flags: str, about: str) -> list[str]:
    _, found = Config.examine(["--rollout-batch-size", "8", *flags])
    return [problem for problem in found if about in problem]


@pytest.mark.parametrize(
    ("flags", "about"),
    [
        (("--over-sampling-batch-size", "4"), "--over-sampling-batch-size 4"),
        (("--mask-offpolicy-in-partial-rollout",), "has no effect without --partial-rollout"),
        (("--rollout-max-context-len", "10", "--rollout-max-prompt-len", "10"), "leaves no room"),
        (("--eval-max-context-len", "10", "--eval-max-prompt-len", "10"), "leaves no room"),
        (("--max-weight-staleness", "2"), "has no effect without --rollout-function-path fully_async"),
        (("--rollout-function-path", "fully_async", "--partial-rollout"), "cuts nothing"),
        (
            (
                "--rollout-function-path",
                "fully_async",
                "--n-samples-per-prompt",
                "8",
                "--async-max-concurrent-samples",
                "4",
            ),
            "less than one group",
        ),
        (("--rollout-buffer-url", "http://service"), "the service reads --prompt-data itself"),
        (("--rollout-task-type", "chess"), "has no effect without --rollout-buffer-url"),
        (("--eval-interval", "5"), "--eval-interval 5"),
        (("--eval-prompt-data", "a", "a.jsonl"), "has no effect without --eval-interval"),
        (("--offload-rollout", "--eval-async"), "engines have no memory then"),
        (("--eval-prompt-data", "a", "a.jsonl", "b", "--eval-interval", "1"), "--eval-prompt-data"),
        ((), "--rollout-max-response-len is required"),
        (("--rollout-num-gpus", "3", "--rollout-num-gpus-per-engine", "2"), "is no multiple"),
        (("--rollout-num-gpus", "4", "--rollout-num-engines", "3"), "contradicts --rollout-num-gpus"),
        (("--device", "cuda"), "--rollout-num-gpus is missing"),
        (
            (
                *("--rollout-engine", "embedded", "--device", "cuda"),
                *("--rollout-num-gpus-per-engine", "16", "--rollout-num-gpus", "16"),
            ),
            "the embedded engine is one process",
        ),
        (("--prefill-num-servers", "1"), "the embedded engine computes prompts and responses itself"),
        (("--prefill-num-servers", "1", "--rollout-engine", "sglang"), "leaves none that decodes"),
        (("--prefill-num-servers", "1", "--use-rollout-routing-replay"), "which experts its prefill server chose"),
        (
            ("--prefill-num-servers", "1", "--rollout-function-path", "fully_async"),
            "Give --pause-generation-mode in_place",
        ),
        (("--prefill-num-servers", "1", "--rollout-external"), "--rollout-external uses those that run"),
        (("--engine-host", "0.0.0.0"), "is no address that others could send to"),
        (
            ("--rollout-engine", "sglang", "--update-weight-delta", "--sglang-speculative-algorithm", "EAGLE"),
            "a change can be made once only",
        ),
        (("--sglang-router-ip", "10.0.0.1"), "needs --sglang-router-port"),
        (("--rollout-external",), "--rollout-external needs --rollout-external-engine-addrs"),
        (("--rollout-external-engine-addrs", "a:1"), "has no effect without --rollout-external"),
        (
            ("--rollout-external", "--rollout-external-engine-addrs", "a:1", "--rollout-num-engines", "2"),
            "--rollout-num-engines 2 contradicts the 1 addresses",
        ),
        (
            ("--rollout-external", "--rollout-external-engine-addrs", "a:1", "--sglang-dtype", "half"),
            "--sglang-dtype cannot change engines that already run",
        ),
        (("--loss-type", "sft_loss", "--n-samples-per-prompt", "2"), "--n-samples-per-prompt 2"),
        (("--opd-teacher-urls", "http://a:1"), "has no effect without --use-opd"),
        (("--use-opd",), "--use-opd needs a teacher"),
        (("--use-opd", "--opd-teacher-load", "nowhere"), "--opd-teacher-load nowhere"),
        (("--use-opd", "--opd-teacher-load", "a", "--opd-teacher-urls", "b"), "both name the teacher"),
        (("--use-opd", "--opd-type", "megatron"), "Name it with --opd-teacher-load"),
        (("--debug-train-only", "--eval-interval", "1", "--eval-prompt-data", "a", "a.jsonl"), "cannot evaluate"),
        (("--rollout-engine", "sgland"), "--rollout-engine sgland"),
        (("--dynamic-sampling-filter-path", "reward_nonzero_sdt"), "Did you mean 'reward_nonzero_std'"),
        (("--custom-generate-function-path", "no_such_package.f"), "there is no package"),
    ],
)
def test_a_contradiction_is_reported(flags, about):
    assert problems(*flags, about=about)


@pytest.mark.parametrize(
    ("flags", "about"),
    [
        (("--over-sampling-batch-size", "16"), "--over-sampling-batch-size"),
        (("--rollout-max-response-len", "10"), "--rollout-max-response-len"),
        (("--rollout-max-context-len", "10"), "--rollout-max-response-len"),
        (("--use-opd", "--opd-teacher-urls", "http://a:1"), "teacher"),
        (("--advantage-estimator", "on_policy_distillation"), "teacher"),
        (("--loss-type", "sft_loss"), "--rollout-max-response-len"),
        (("--rollout-external", "--rollout-external-engine-addrs", "a:1", "b:2"), "--rollout-external"),
        (("--dynamic-sampling-filter-path", "reward_nonzero_std"), "--dynamic-sampling-filter-path"),
        (("--sglang-router-port", "30000"), "--sglang-router"),
        (("--sglang-router-ip", "10.0.0.1", "--sglang-router-port", "30000"), "--sglang-router"),
        (
            (
                *("--prefill-num-servers", "1", "--rollout-function-path", "fully_async"),
                *("--pause-generation-mode", "in_place"),
            ),
            "--pause-generation-mode",
        ),
    ],
)
def test_what_fits_together_is_accepted(flags, about):
    assert not problems(*flags, about=about)
