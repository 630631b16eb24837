"""The four knobs of a batch.

``rollout_batch_size * n_samples_per_prompt = global_batch_size * num_steps_per_rollout``: three give the fourth.
"""

from __future__ import annotations

from miles.core.config.draft import Draft

_EQUATION = "--rollout-batch-size x --n-samples-per-prompt = --global-batch-size x --num-steps-per-rollout"


def complete_batch(draft: Draft) -> None:
    """Derive the knob that is missing, and make sure that all four agree."""
    _derive_steps_of_dynamic_batch(draft)
    if _any_refused(draft):
        return
    if draft["rollout_batch_size"] is None:
        _derive_left(draft, "rollout_batch_size", by="n_samples_per_prompt")
    elif not draft.typed("n_samples_per_prompt") and _both_given(draft):
        _derive_left(draft, "n_samples_per_prompt", by="rollout_batch_size")
    elif _both_given(draft):
        _validate(draft)
    else:
        _derive_right(draft)


def nearest_divisors(total: int, wanted: int) -> list[int]:
    """The divisors of ``total`` next to ``wanted``, the one below first."""
    divisors = [number for number in range(1, total + 1) if total % number == 0]
    below = [number for number in divisors if number <= wanted][-1:]
    above = [number for number in divisors if number > wanted][:1]
    return below + above


def _any_refused(draft: Draft) -> bool:
    knobs = {"rollout_batch_size", "n_samples_per_prompt", "global_batch_size", "num_steps_per_rollout"}
    return bool(knobs & draft.refused)


def _both_given(draft: Draft) -> bool:
    return draft["global_batch_size"] is not None and draft["num_steps_per_rollout"] is not None


def _derive_steps_of_dynamic_batch(draft: Draft) -> None:
    if "use_dynamic_global_batch_size" not in draft or not draft["use_dynamic_global_batch_size"]:
        return
    draft.derive("num_steps_per_rollout", 1, "--use-dynamic-global-batch-size takes one step per rollout")
    if draft.typed("global_batch_size"):
        draft.problems.append(
            f"{draft.spell('global_batch_size')} contradicts --use-dynamic-global-batch-size, which makes every "
            "rollout one step. Leave one of them out"
        )
    if draft["num_steps_per_rollout"] != 1:
        draft.problems.append(
            f"{draft.spell('num_steps_per_rollout')} contradicts --use-dynamic-global-batch-size, which makes every "
            "rollout one step. Leave one of them out"
        )


def _derive_left(draft: Draft, name: str, *, by: str) -> None:
    """``rollout_batch_size`` or ``n_samples_per_prompt`` from the right side and the other factor of the left."""
    if not _both_given(draft) or not draft.typed(by):
        return
    samples, factor = draft["global_batch_size"] * draft["num_steps_per_rollout"], draft[by]
    if samples % factor:
        draft.refuse(
            name,
            f"{draft.spell('global_batch_size')} x {draft.spell('num_steps_per_rollout')} = {samples} samples per "
            f"rollout are no multiple of {draft.spell(by)}, so {draft.flags[name].spelling} cannot be derived. "
            f"{draft.flags[by].spelling} {_or(nearest_divisors(samples, factor))} would work ({_EQUATION})",
        )
        return
    draft.derive(name, samples // factor, _EQUATION)


def _derive_right(draft: Draft) -> None:
    """``global_batch_size`` or ``num_steps_per_rollout`` from the left side; one step when neither is given."""
    samples = draft["rollout_batch_size"] * draft["n_samples_per_prompt"]
    draft_steps = draft["num_steps_per_rollout"]
    if draft["global_batch_size"] is not None:
        known, missing, factor = "global_batch_size", "num_steps_per_rollout", draft["global_batch_size"]
    else:
        known, missing, factor = "num_steps_per_rollout", "global_batch_size", draft_steps or 1
        draft.derive(
            known, factor, "one step per rollout unless --num-steps-per-rollout or --global-batch-size is given"
        )
    if samples % factor == 0:
        draft.derive(missing, samples // factor, _EQUATION)
        return
    draft.refuse(
        known,
        f"{draft.spell(known)} does not divide the {samples} samples of a rollout ({draft.spell('rollout_batch_size')} "
        f"x {draft.spell('n_samples_per_prompt')}). {draft.flags[known].spelling} "
        f"{_or(nearest_divisors(samples, factor))} would work ({_EQUATION})",
    )


def _validate(draft: Draft) -> None:
    left = draft["rollout_batch_size"] * draft["n_samples_per_prompt"]
    right = draft["global_batch_size"] * draft["num_steps_per_rollout"]
    if left != right:
        draft.refuse(
            "global_batch_size",
            f"{draft.spell('rollout_batch_size')} x {draft.spell('n_samples_per_prompt')} = {left} samples per "
            f"rollout, but {draft.spell('global_batch_size')} x {draft.spell('num_steps_per_rollout')} = {right}. "
            "Leave one of the four out and it is derived",
        )


def _or(values: list[int]) -> str:
    return " or ".join(str(value) for value in values)
