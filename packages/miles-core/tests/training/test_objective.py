"""The composed objective: against the oracle, and laws that any composition obeys."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.core.advantages.estimate import AdvantageInputs
from miles.core.errors import PluginError
from miles.core.math.logprobs import LogProbs
from miles.core.math.ragged import Ragged
from miles.core.oracle.objective import OracleSample, policy_objective
from miles.core.training.loss_batch import LossBatch
from miles.core.training.metric_sums import MetricSums
from miles.core.training.objective import ObjectiveSpec, build_advantages, build_objective

COLUMNS = ("mask", "logp", "entropy", "old_logp", "ref_logp", "rollout_logp", "advantage")

SPECS = st.builds(
    ObjectiveSpec,
    advantage_estimator=st.sampled_from(["grpo", "gspo"]),
    calculate_per_token_loss=st.booleans(),
    eps_clip=st.sampled_from([0.01, 0.2]),
    eps_clip_high=st.sampled_from([None, 0.28]),
    eps_clip_c=st.sampled_from([None, 1.5]),
    use_kl_loss=st.booleans(),
    kl_loss_coef=st.sampled_from([0.0, 0.3]),
    kl_loss_type=st.sampled_from(["k1", "k2", "k3", "low_var_kl"]),
    use_unbiased_kl=st.booleans(),
    entropy_coef=st.sampled_from([0.0, 0.1]),
    use_opsm=st.booleans(),
    opsm_delta=st.just(0.05),
    use_rollout_logprobs=st.booleans(),
    use_tis=st.booleans(),
    tis_clip_low=st.sampled_from([0.0, 0.8]),
    tis_clip=st.just(1.2),
    custom_tis_function_path=st.sampled_from([None, "icepop"]),
)


@st.composite
def batches(draw, max_samples=4):
    """A few samples with random columns."""
    lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=max_samples))
    return [random_sample(np.random.default_rng(draw(st.integers(0, 2**32))), length) for length in lengths]


def random_sample(generator, length):
    logp = -generator.exponential(1.0, length)
    near = {name: logp + generator.normal(0, 0.3, length) for name in ("old_logp", "ref_logp", "rollout_logp")}
    return OracleSample(
        mask=(generator.random(length) < 0.8).astype(float),
        logp=logp,
        entropy=generator.random(length),
        advantage=generator.normal(size=length),
        **near,
    )


def packed(samples, dtype=torch.float64):
    """Scores (with gradient) and batch of ``samples``."""
    column = {
        name: torch.tensor(np.concatenate([getattr(s, name) for s in samples] or [[]]), dtype=dtype) for name in COLUMNS
    }
    scores = LogProbs(column["logp"].requires_grad_(), column["entropy"].requires_grad_())
    batch = LossBatch(
        layout=Ragged([len(sample.mask) for sample in samples]),
        mask_T=column["mask"],
        advantage_T=column["advantage"],
        old_logp_T=column["old_logp"],
        ref_logp_T=column["ref_logp"],
        rollout_logp_T=column["rollout_logp"],
    )
    return scores, batch


def run(spec, samples):
    scores, batch = packed(samples)
    return build_objective(spec, spec)(scores, batch)


@settings(max_examples=30, deadline=None)
@given(SPECS, batches())
def test_loss_and_metrics_equal_the_oracle(spec, samples):
    output = run(spec, samples)
    loss, metrics = policy_objective(samples, spec)
    np.testing.assert_allclose(output.loss.item(), loss, rtol=1e-8, atol=1e-10)
    for name, value in metrics.items():
        np.testing.assert_allclose(output.token_metrics[name].item(), value, rtol=1e-8, atol=1e-10, err_msg=name)


@settings(max_examples=20, deadline=None)
@given(SPECS, batches(max_samples=2))
def test_gradients_equal_numerical_ones_of_the_oracle(spec, samples):
    scores, batch = packed(samples)
    build_objective(spec, spec)(scores, batch).loss.backward()
    step = 1e-6
    found = torch.cat([scores.logp_T.grad]).numpy()
    position = 0
    for number, sample in enumerate(samples):
        for t in range(len(sample.mask)):
            losses = []
            for sign in (1, -1):
                logp = sample.logp.copy()
                logp[t] += sign * step
                moved = [*samples[:number], replace(sample, logp=logp), *samples[number + 1 :]]
                losses.append(policy_objective(moved, spec)[0])
            np.testing.assert_allclose(found[position], (losses[0] - losses[1]) / (2 * step), rtol=1e-4, atol=1e-6)
            position += 1


def everything(**changes):
    return ObjectiveSpec(
        **{
            "use_kl_loss": True,
            "kl_loss_coef": 0.1,
            "kl_loss_type": "k3",
            "entropy_coef": 0.01,
            "use_opsm": True,
            "use_tis": True,
        }
        | changes
    )


LAW_SPECS = st.sampled_from(
    [
        everything(),
        everything(calculate_per_token_loss=True, advantage_estimator="gspo"),
        everything(custom_tis_function_path="mis", use_rs=True, rs_veto_threshold=0.5, tis_batch_normalize=True),
        everything(custom_tis_function_path="mis", tis_level="sequence", tis_mode="mask", tis_batch_normalize=True),
        everything(custom_tis_function_path="mis", tis_level="geometric", tis_batch_normalize=True),
    ]
)


@settings(max_examples=25, deadline=None)
@given(LAW_SPECS, batches(), st.data())
def test_packing_changes_neither_loss_nor_gradient_nor_metrics(spec, samples, data):
    """Splitting the samples of a step into micro-batches, some of them empty, is invisible."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(samples)), max_size=3)))
    parts = [samples[a:b] for a, b in zip([0, *cuts], [*cuts, len(samples)], strict=True)]
    whole, split = step(spec, [samples]), step(spec, parts)
    assert whole[1].keys() == split[1].keys()
    for name, value in whole[1].items():
        np.testing.assert_allclose(split[1][name], value, rtol=1e-8, atol=1e-10, err_msg=name)
    np.testing.assert_allclose(split[0], whole[0], rtol=1e-8, atol=1e-10)


def step(spec, parts):
    """Gradient with respect to the log-probabilities, and metrics, of one optimizer step."""
    objective = build_objective(spec, spec)
    packs = [packed(part) for part in parts]
    mask_sums = [sample.mask.sum() for part in parts for sample in part]
    denominator = objective.denominator(mask_sums)
    sums = MetricSums()
    for (scores, _), batch in zip(packs, objective.prepare([batch for _, batch in packs]), strict=True):
        output = objective(scores, batch)
        (output.loss / denominator).backward()
        sums.add(output)
    gradients = torch.cat([scores.logp_T.grad for scores, _ in packs])
    return gradients.numpy(), sums.means(denominator=denominator, num_samples=len(mask_sums))


@settings(max_examples=30, deadline=None)
@given(batches())
def test_normalized_weights_have_mean_one_over_the_step(samples):
    spec = ObjectiveSpec(use_tis=True, custom_tis_function_path="mis", tis_batch_normalize=True)
    spec = replace(spec, calculate_per_token_loss=True)
    _, metrics = step(spec, [samples[:1], samples[1:]])
    trained = sum(sample.mask.sum() for sample in samples)
    if trained:
        denominator = sum(max(sample.mask.sum(), 1.0) for sample in samples)
        np.testing.assert_allclose(metrics["mis_is_ratio_mean_final"] * denominator / trained, 1.0)


def test_context_parallel_ranks_add_up_to_the_whole():
    """Each rank holds a part of every sample; sums over samples go through ``add``."""
    spec = everything(advantage_estimator="gspo", custom_tis_function_path="mis", tis_level="sequence", use_rs=True)
    samples = [random_sample(np.random.default_rng(seed), 6) for seed in range(3)]
    scores, whole = packed(samples)
    objective = build_objective(spec, spec)
    expected = objective(scores, whole)
    expected.loss.backward()

    halves = [torch.arange(18).reshape(3, 6)[:, columns].flatten() for columns in (slice(0, 2), slice(2, 6))]
    totals = run_context_parallel(objective, scores, whole, halves)
    for name, value in expected.token_metrics.items():
        torch.testing.assert_close(totals[name], value, msg=name)
    for name, value in expected.sample_metrics.items():
        torch.testing.assert_close(totals[name], value, msg=name)


def run_context_parallel(objective, scores, whole, halves):
    """Run the ranks in lock-step: every sum over ranks is taken when all have brought their part."""
    barrier, slots, results = threading.Barrier(len(halves)), [None] * len(halves), [None] * len(halves)

    def rank(index):
        def add(x_S):
            slots[index] = x_S
            barrier.wait()
            total = sum(slots)
            barrier.wait()
            return total

        tokens = halves[index]
        batch = LossBatch(
            layout=Ragged([len(tokens) // 3] * 3),
            mask_T=whole.mask_T[tokens],
            advantage_T=whole.advantage_T[tokens],
            old_logp_T=whole.old_logp_T[tokens],
            ref_logp_T=whole.ref_logp_T[tokens],
            rollout_logp_T=whole.rollout_logp_T[tokens],
            given_mask_sum_S=whole.mask_sum_S,
            add=add,
        )
        own = LogProbs(scores.logp_T.detach()[tokens], scores.entropy_T.detach()[tokens])
        results[index] = objective(own, batch)

    threads = [threading.Thread(target=rank, args=(index,)) for index in range(len(halves))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    merged = [output.token_metrics | output.sample_metrics for output in results]
    return {name: sum(metrics[name] for metrics in merged) for name in merged[0]}


ONE_STEP_SPECS = [ObjectiveSpec(), everything(), everything(advantage_estimator="gspo"), everything(use_rs=True)]


@pytest.mark.parametrize("spec", ONE_STEP_SPECS)
def test_without_old_log_probs_the_forward_pass_is_the_old_policy(spec):
    samples = [random_sample(np.random.default_rng(seed), 5) for seed in range(3)]
    samples = [replace(sample, old_logp=sample.logp) for sample in samples]
    outputs, gradients = [], []
    for old_known in (True, False):
        scores, batch = packed(samples)
        objective = build_objective(spec, spec)
        (batch,) = objective.prepare([batch if old_known else replace(batch, old_logp_T=None)])
        output = objective(scores, batch)
        output.loss.backward()
        outputs.append({"loss": output.loss.detach()} | output.token_metrics | output.sample_metrics)
        gradients.append(scores.logp_T.grad)
    assert torch.equal(*gradients)
    assert all(torch.equal(outputs[0][name], outputs[1][name]) for name in outputs[0])
    assert outputs[0]["ppo_kl"] == 0.0


def test_on_policy_gradient_is_minus_the_weighted_advantage():
    spec = ObjectiveSpec()
    scores, batch = packed([random_sample(np.random.default_rng(0), 4)])
    build_objective(spec, spec)(scores, replace(batch, old_logp_T=None)).loss.backward()
    torch.testing.assert_close(scores.logp_T.grad, -batch.advantage_T * batch.mask_T / batch.mask_sum_S)


def test_mismatch_metrics_alone_do_not_change_the_loss():
    samples = [random_sample(np.random.default_rng(0), 5)]
    for name in ("tis", "icepop", "mis"):
        measured = run(ObjectiveSpec(get_mismatch_metrics=True, custom_tis_function_path=name), samples)
        assert measured.loss == run(ObjectiveSpec(), samples).loss
        assert measured.token_metrics.keys() > run(ObjectiveSpec(), samples).token_metrics.keys()


def test_rejected_tokens_leave_the_numerator_only():
    """The denominator stays the sample's own, so that rejection does not make its other tokens count more."""
    sample = replace(
        random_sample(np.random.default_rng(0), 4),
        mask=np.ones(4),
        old_logp=np.array([-1.0, -1.0, -9.0, -1.0]),
        rollout_logp=np.full(4, -1.0),
    )
    scores, batch = packed([sample])
    build_objective(ObjectiveSpec(use_rs=True), ObjectiveSpec(use_rs=True))(scores, batch).loss.backward()
    rejected, plain = scores.logp_T.grad, packed([sample])
    build_objective(ObjectiveSpec(), None)(*plain).loss.backward()
    kept = torch.tensor([True, True, False, True])
    assert torch.equal(rejected[kept], plain[0].logp_T.grad[kept])
    assert rejected[2] == 0.0


def test_a_micro_batch_without_samples_knows_every_metric():
    spec = everything(use_rs=True)
    empty, some = run(spec, []), run(spec, [random_sample(np.random.default_rng(0), 3)])
    assert empty.token_metrics.keys() == some.token_metrics.keys()
    assert empty.sample_metrics.keys() == some.sample_metrics.keys()
    assert empty.loss == 0.0
    empty.loss.backward()


def test_sft_loss_is_the_mean_negative_log_likelihood():
    spec = ObjectiveSpec(loss_type="sft_loss")
    sample = replace(
        random_sample(np.random.default_rng(0), 3), logp=np.array([-1.0, -2.0, -9.0]), mask=np.array([1.0, 1.0, 0.0])
    )
    scores, batch = packed([sample])
    output = build_objective(spec, spec)(scores, batch)
    output.loss.backward()
    assert output.loss == output.token_metrics["loss"] == 1.5
    assert scores.logp_T.grad.tolist() == [-0.5, -0.5, 0.0]


def test_the_critic_trains_on_returns():
    objective = build_objective(ObjectiveSpec(value_clip=0.2), None, role="critic")
    value_T = torch.tensor([1.0, 0.0], requires_grad=True)
    batch = LossBatch(Ragged([2]), torch.ones(2), return_T=torch.tensor([0.0, 0.0]), old_value_T=torch.zeros(2))
    output = objective(value_T, batch)
    assert objective.consumes == "values"
    assert output.loss == 0.5
    assert output.token_metrics == {"loss": 0.5, "value_loss": 0.5, "value_clipfrac": 0.5}


@pytest.mark.parametrize(
    ("spec", "column", "name"),
    [
        (ObjectiveSpec(), {"advantage_T": None}, "advantage_T"),
        (everything(), {"ref_logp_T": None}, "ref_logp_T"),
        (ObjectiveSpec(use_rollout_logprobs=True), {"rollout_logp_T": None}, "rollout_logp_T"),
        (ObjectiveSpec(use_tis=True), {"rollout_logp_T": None}, "engine's log-probabilities"),
    ],
)
def test_a_missing_column_is_named(spec, column, name):
    scores, batch = packed([random_sample(np.random.default_rng(0), 3)])
    with pytest.raises(ValueError, match=name):
        build_objective(spec, spec)(scores, replace(batch, **column))


def test_normalized_weights_need_old_log_probs_of_their_own():
    spec = everything(custom_tis_function_path="mis", tis_batch_normalize=True)
    _, batch = packed([random_sample(np.random.default_rng(0), 3)])
    with pytest.raises(ValueError, match="old_logp_T"):
        build_objective(spec, spec).prepare([replace(batch, old_logp_T=None)])


def test_an_unknown_correction_is_refused_by_name():
    spec = ObjectiveSpec(use_tis=True, custom_tis_function_path="icepopp")
    with pytest.raises(PluginError, match="icepop"):
        build_objective(spec, spec)


def advantage_inputs(**columns):
    mask_A = torch.tensor([1.0, 1.0, 0.0])
    return AdvantageInputs(Ragged([3]), mask_A, torch.tensor([1.0]), **columns)


def test_kl_shapes_rewards_of_estimators_that_use_it():
    logp, ref = torch.tensor([-1.0, -2.0, -50.0]), torch.tensor([-1.5, -2.0, 0.0])
    inputs = advantage_inputs(old_logp_A=logp, ref_logp_A=ref)
    shaped = build_advantages(ObjectiveSpec(advantage_estimator="reinforce_plus_plus", kl_coef=0.1))(inputs)
    torch.testing.assert_close(shaped.advantage_A, torch.tensor([0.95, 1.0, 0.0]))
    assert build_advantages(ObjectiveSpec())(inputs).advantage_A.tolist() == [1.0, 1.0, 1.0]


def test_the_engines_log_probs_can_be_the_old_ones():
    spec = ObjectiveSpec(advantage_estimator="on_policy_distillation", use_rollout_logprobs=True)
    rollout, teacher = torch.tensor([-1.0, -2.0, -3.0]), torch.zeros(3)
    found = build_advantages(spec)(advantage_inputs(rollout_logp_A=rollout, teacher_logp_A=teacher))
    assert found.advantage_A.tolist() == [1.0, 2.0, 3.0]


def test_distillation_lowers_the_advantages_of_any_estimator_and_leaves_returns():
    spec = ObjectiveSpec(use_opd=True, opd_kl_coef=0.5)
    logp, teacher = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-2.0, -1.0, -3.0])
    found = build_advantages(spec)(advantage_inputs(old_logp_A=logp, teacher_logp_A=teacher))
    assert found.advantage_A.tolist() == [0.5, 1.5, 1.0]
    assert found.return_A.tolist() == [1.0, 1.0, 1.0]


def test_normalized_advantages_are_whitened_and_returns_are_not():
    spec = ObjectiveSpec(advantage_estimator="reinforce_plus_plus", gamma=0.5, normalize_advantages=True)
    found = build_advantages(spec)(advantage_inputs())
    torch.testing.assert_close(found.advantage_A[:2], torch.tensor([-(0.5**0.5), 0.5**0.5]))
    assert found.return_A.tolist() == [0.5, 1.0, 0.0]


def test_a_kl_penalty_without_log_probs_is_an_error():
    spec = ObjectiveSpec(advantage_estimator="reinforce_plus_plus", kl_coef=0.1)
    with pytest.raises(ValueError, match="reference model"):
        build_advantages(spec)(advantage_inputs())
