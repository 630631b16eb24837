"""Agreement with public graders, case by case.

The cases are those of the folder named by ``MILES_REWARD_CASES``, or those beside this file.  Each suite has a floor.
"""

import asyncio
import json
import math
import os
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from miles.core.types import Sample
from miles.rewards.catalogue import Catalogue
from miles.rewards.context import Context, Settings

FOLDER = Path(os.environ.get("MILES_REWARD_CASES") or Path(__file__).parent / "cases")

# Least agreement by (reward type, contract).  "semantic" suites judge more than the classical graders promise:
# math-verify reaches 0.92 on those of mathematics, the PRM800K grader, whose contract `math` keeps, 0.40.
FLOORS = {
    ("math", "exact"): 1.0,
    ("math", "component"): 1.0,
    ("math", "recorded"): 0.997,
    ("math", "semantic"): 0.39,
    ("math_verify", "recorded"): 0.99,
    ("math_verify", "semantic"): 0.88,
    ("deepscaler", "exact"): 1.0,
    ("deepscaler", "semantic"): 1.0,
    ("dapo", "exact"): 1.0,
    ("dapo", "component"): 1.0,
    ("dapo", "recorded"): 1.0,
    ("f1", "exact"): 1.0,
    ("boxed_f1", "exact"): 1.0,
    ("f1", "semantic"): 0.6,
    ("gpqa", "exact"): 0.95,
    ("gpqa", "component"): 0.95,
    ("gpqa", "semantic"): 0.85,
    ("ifbench", "exact"): 1.0,
    ("ifbench", "recorded"): 0.97,
    ("ifbench", "semantic"): 0.6,
}


def read_cases():
    for path in sorted(FOLDER.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            case = json.loads(line)
            if case.get("applicable", True) and case.get("contract") != "unit":
                yield case


def sample_of(case):
    metadata = {**(case.get("metadata") or {}), **(case.get("options") or {})}
    return Sample(response=case.get("response") or "", label=case["label"], metadata=metadata)


async def grade(cases, rm_type=None):
    context = Context(Settings(num_workers=2, timeout_s=60.0))
    catalogue = Catalogue(context)
    scorers = {name: catalogue.scorer(name) for name in {rm_type or case["rm_type"] for case in cases}}
    try:
        return await asyncio.gather(*(scorers[rm_type or case["rm_type"]].score(sample_of(case)) for case in cases))
    finally:
        context.close()


def agrees(outcome, expected):
    if isinstance(expected, dict):
        return all(outcome.score[key] == value for key, value in expected.items())
    score = outcome.score["acc"] if isinstance(outcome.score, dict) else outcome.score
    return abs(float(score) - float(expected)) < 1e-6


def report(cases, outcomes, rm_type=None):
    """Verdicts on the grader by (type, contract), and by suite but for semantic ones, which differ in what they call
    equal; the agreement of every suite is printed."""
    tallies, suites = defaultdict(list), defaultdict(list)
    for case, outcome in zip(cases, outcomes):
        key = (rm_type or case["rm_type"], case["contract"])
        right = agrees(outcome, case["expected"])
        tallies[key].append(right)
        suites[*key, case.get("suite")].append(right)
    for key, verdicts in sorted(suites.items(), key=str):
        share = sum(verdicts) / len(verdicts)
        sys.stdout.write(f"{' / '.join(map(str, key)):55} {sum(verdicts):5} of {len(verdicts):5}  {share:.1%}\n")
    return tallies | {key: verdicts for key, verdicts in suites.items() if key[1] != "semantic"}


def below_floor(tallies):
    """What has more misses than the floor of its type and contract permits, rounded up to whole cases."""
    counts = {key: (verdicts.count(False), len(verdicts)) for key, verdicts in tallies.items()}
    return {
        key: count for key, count in counts.items() if count[0] > math.ceil((1 - FLOORS.get(key[:2], 0.9)) * count[1])
    }


def test_every_suite_reaches_its_floor():
    cases = [case for case in read_cases() if "contract" in case and case["expected"] is not None]
    assert cases, f"no cases in {FOLDER}"
    assert not below_floor(report(cases, asyncio.run(grade(cases))))


@pytest.mark.slow
def test_math_verify_reaches_its_floor():
    pytest.importorskip("math_verify")
    cases = [
        case
        for case in read_cases()
        if case["rm_type"] == "math"
        and case.get("contract") in ("recorded", "semantic")
        and case["expected"] is not None
    ]
    assert not below_floor(report(cases, asyncio.run(grade(cases, "math_verify")), "math_verify"))


def test_no_case_is_left_without_a_verdict_for_want_of_time_or_health():
    cases = [case for case in read_cases() if case.get("expected_kind") == "must_return"]
    outcomes = asyncio.run(grade(cases))
    lost = [
        (case["id"], outcome.category, outcome.detail)
        for case, outcome in zip(cases, outcomes)
        if outcome.category in ("timeout", "crash", "error", "bad_score")
    ]
    assert not lost


def test_code_in_answers_is_wrong_and_nothing_else():
    cases = [case for case in read_cases() if case.get("category") == "code_like" and case["rm_type"] == "math"]
    outcomes = asyncio.run(grade(cases))
    assert {outcome.category for outcome in outcomes} <= {"wrong", "unparsable"}
