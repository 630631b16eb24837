import pytest
import torch
from engine_models import CONTEXT, EOS, VOCABULARY, Ask, Driver, bits, generate, load, random_asks

from miles.rollout.engines.embedded.scheduler import Limits

PROMPT = [5, 6, 7, 8]


@pytest.fixture
def served(model):
    return model("qwen3-tied")


@pytest.fixture
def own(model_path):
    """A model that a test may change."""
    return load(model_path("qwen3-tied"))


def greedy(served, length=30):
    return generate(served, [Ask(PROMPT, {"max_new_tokens": length, "temperature": 0.0})])[0]


def ask(number=0, **params):
    return Ask(PROMPT, {"max_new_tokens": 20, "temperature": 0.0, **params}, seed=number)


def test_a_response_ends_at_its_limit(served):
    result = greedy(served, 9)
    assert len(result.tokens) == len(result.logps) == 9
    assert result.finish == {"type": "length", "length": 9}


def test_a_response_ends_with_its_stop_token_and_keeps_it(served):
    tokens = greedy(served).tokens
    stop = tokens[6]
    result = generate(served, [Ask(PROMPT, {"max_new_tokens": 30, "temperature": 0.0}, stop_ids=(EOS, stop))])[0]
    assert result.tokens == tokens[: tokens.index(stop) + 1]
    assert result.finish == {"type": "stop", "matched": stop}


def test_many_stop_tokens(served):
    tokens = greedy(served).tokens
    stops = tuple(token for token in range(VOCABULARY) if token not in tokens[:8])
    result = generate(served, [Ask(PROMPT, {"max_new_tokens": 30, "temperature": 0.0}, stop_ids=stops)])[0]
    assert result.tokens == tokens[: len(result.tokens)]
    assert result.finish == {"type": "stop", "matched": result.tokens[-1]}


def test_a_stop_string_beats_a_stop_token(served):
    result = generate(
        served,
        [
            Ask(
                PROMPT,
                {"max_new_tokens": 30},
                stop_ids=tuple(range(VOCABULARY)),
                options={"matches_stop": lambda tokens: "x" if len(tokens) == 1 else None},
            )
        ],
    )[0]
    assert result.finish == {"type": "stop", "matched": "x"}


def test_no_stop_before_the_minimum_length(served):
    stop = greedy(served).tokens[2]
    result = generate(
        served, [Ask(PROMPT, {"max_new_tokens": 20, "min_new_tokens": 10, "temperature": 0.0}, stop_ids=(stop,))]
    )[0]
    assert stop not in result.tokens[:10]
    assert len(result.tokens) >= 10


def test_no_output_wanted(served):
    result = generate(served, [ask(max_new_tokens=0), ask()])[0]
    assert (result.tokens, result.finish) == ([], {"type": "length", "length": 0})


@pytest.mark.parametrize("first", ["score", "generate"])
def test_a_prompt_is_scored_and_generated_from_in_one_step(served, first):
    scored = Ask(PROMPT, {"max_new_tokens": 0}, options={"score_from": 0})
    asks = [scored, ask()] if first == "score" else [ask(), scored]
    together, alone = generate(served, asks), [generate(served, [one])[0] for one in asks]
    assert [bits(result) for result in together] == [bits(result) for result in alone]


def test_more_requests_than_seats_queue_in_order(served):
    driver = Driver(served, Limits(max_running=3, context_length=CONTEXT, kv_tokens=1 << 16))
    asks = random_asks(10)
    driver.add(asks)
    driver.run(steps=1)
    assert len(driver.scheduler.running()) <= 3
    assert len(driver.run()) == 10
    assert [bits(result) for result in driver.run()] == [bits(result) for result in generate(served, asks)]
    driver.assert_empty()


def test_memory_stays_within_the_budget(served):
    driver = Driver(served, Limits(context_length=CONTEXT, kv_tokens=1500))
    driver.add(random_asks(30, longest_prompt=200, longest_output=100))
    while not driver.scheduler.idle:
        driver.scheduler.step()
        assert driver.scheduler.kv.allocated_tokens <= 1500
    assert len(driver.finals) == 30
    driver.assert_empty()


def test_prompts_join_within_the_prefill_budget(served):
    driver = Driver(served, Limits(context_length=CONTEXT, kv_tokens=1 << 16, prefill_tokens=64))
    driver.add([Ask([n + 3] * 30, {"max_new_tokens": 5}) for n in range(6)])
    driver.run(steps=1)
    assert len(driver.scheduler.running()) == 2
    assert len(driver.run()) == 6


def test_an_aborted_response_keeps_what_it_has(served):
    driver = Driver(served, Limits(max_running=2, context_length=CONTEXT, kv_tokens=1 << 16))
    driver.add([ask(), ask(max_new_tokens=25), ask()])
    driver.run(steps=7)
    assert driver.scheduler.abort(lambda sequence: sequence.rid == "1") == 1
    assert driver.finals[1].finish == {"type": "abort", "message": "Aborted"}
    assert driver.finals[1].tokens == greedy(served).tokens[:7]
    assert driver.scheduler.abort(lambda sequence: sequence.rid == "2") == 1
    assert driver.finals[2].tokens == []
    assert driver.run()[0].tokens == greedy(served).tokens[:20]
    driver.assert_empty()


def test_pause_abort_ends_everything(served):
    driver = Driver(served)
    driver.add([ask(), ask()])
    driver.run(steps=3)
    driver.scheduler.pause("abort")
    assert [len(result.tokens) for result in driver.run()] == [3, 3]
    driver.assert_empty()


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_nothing_is_computed_while_paused(served, mode):
    driver = Driver(served)
    driver.add([ask()])
    driver.run(steps=3)
    driver.scheduler.pause(mode)
    driver.add([ask()])
    assert driver.scheduler.idle
    assert driver.run() == []
    driver.scheduler.resume()
    assert [result.tokens for result in driver.run()] == [greedy(served).tokens[:20]] * 2
    assert driver.sequences[0].num_retractions == (1 if mode == "retract" else 0)


def test_nothing_is_computed_during_a_weight_update(served):
    driver = Driver(served)
    driver.add([ask()])
    driver.scheduler.updating = True
    assert driver.run() == []
    driver.scheduler.updating = False
    assert len(driver.run()) == 1


def change(model):
    """Other weights."""
    for name in model.weights.names():
        held = model.weights.read(name)
        noise = torch.randn(held.shape, generator=torch.Generator().manual_seed(1))
        model.weights.write(name, held + 0.05 * noise)


def test_retracted_responses_go_on_with_the_new_weights(own):
    before = greedy(own).tokens
    driver = Driver(own)
    driver.add([ask()])
    driver.run(steps=8)
    driver.scheduler.pause("retract")
    change(own)
    driver.scheduler.weights_changed()
    driver.scheduler.set_version("2")
    driver.scheduler.resume()
    result = driver.run()[0]
    assert result.tokens[:8] == before[:8]
    expected = generate(own, [Ask(PROMPT + before[:8], {"max_new_tokens": 12, "temperature": 0.0})])[0]
    assert result.tokens[8:] == expected.tokens
    assert result.logps[8:] == expected.logps
    assert result.versions == [("default", 0, 8), ("2", 8, 20)]


def test_responses_paused_in_place_keep_their_old_keys(own):
    driver = Driver(own)
    driver.add([ask()])
    driver.run(steps=8)
    driver.scheduler.pause("in_place")
    change(own)
    driver.scheduler.set_version("2")
    driver.scheduler.resume()
    result = driver.run()[0]
    fresh = generate(own, [Ask(PROMPT + result.tokens[:8], {"max_new_tokens": 12, "temperature": 0.0})])[0]
    assert result.logps[8:] != fresh.logps
    assert driver.sequences[0].num_retractions == 0


def test_prompts_of_other_weights_are_not_shared(own):
    driver = Driver(own)
    driver.add([ask()])
    driver.run(steps=3)
    change(own)
    driver.scheduler.weights_changed()
    driver.add([ask(1)])
    driver.run()
    assert driver.sequences[1].cached_tokens == 0
    assert driver.finals[1].tokens == greedy(own).tokens[:20]


def test_version_spans(served):
    driver = Driver(served)
    driver.add([ask(), ask()])
    driver.scheduler.set_version("1")
    driver.run(steps=5)
    driver.scheduler.set_version("2")
    driver.scheduler.set_version("3")
    driver.scheduler.set_version("3")
    driver.run(steps=5)
    driver.scheduler.set_version("4")
    result = driver.run()[0]
    assert result.versions == [("1", 0, 5), ("3", 5, 10), ("4", 10, 20)]


def test_streamed_progress_grows_by_a_token(served):
    seen = []
    driver = Driver(served)
    driver.add([Ask(PROMPT, {"max_new_tokens": 4}, options={"stream": True, "notify": seen.append})])
    driver.run()
    assert [len(progress.tokens) for progress in seen] == [1, 2, 3, 4]
    assert [progress.finish is None for progress in seen] == [True, True, True, False]


def test_most_probable_tokens(served):
    driver = Driver(served)
    driver.add([Ask(PROMPT, {"max_new_tokens": 5, "temperature": 0.0}, options={"num_top_logps": 3}), ask()])
    result = driver.run()[0]
    tops = driver.sequences[0].top_logps
    assert [top[0] for top in tops] == list(zip(result.logps, result.tokens, strict=True))
    assert all(len(top) == 3 and top[0][0] >= top[1][0] >= top[2][0] for top in tops)


def test_scoring_starts_where_it_is_wanted(served):
    prompt = list(range(3, 23))
    driver = Driver(served)
    driver.add([Ask(prompt, {"max_new_tokens": 0}, options={"score_from": start}) for start in (0, 7, 19)])
    driver.run()
    whole, part, none = (driver.sequences[number].prompt_logps for number in range(3))
    assert len(whole) == 19
    assert part == whole[7:]
    assert none == []


def test_penalties_change_what_is_sampled(served):
    plain = greedy(served, 60).tokens
    assert len(set(plain)) < len(plain)
    never = generate(served, [ask(max_new_tokens=60, presence_penalty=2.0, frequency_penalty=2.0)])[0].tokens
    assert len(set(never)) > len(set(plain))
    repeated = generate(served, [ask(max_new_tokens=60, repetition_penalty=1.8)])[0].tokens
    assert len(set(repeated)) > len(set(plain))


def test_probabilities_that_are_not_numbers_end_the_response(own):
    own.weights.write("model.norm.weight", torch.full((48,), float("nan")))
    result = generate(own, [ask()])[0]
    assert result.finish == {"type": "abort", "message": "the model's probabilities are not numbers"}


def test_a_crowd_leaves_nothing_behind(served):
    driver = Driver(served, Limits(max_running=16, context_length=CONTEXT, kv_tokens=4000))
    for round_ in range(3):
        driver.add(random_asks(40, seed=round_))
        driver.run(steps=15)
        driver.scheduler.abort(lambda sequence: int(sequence.rid) % 7 == 0)
        driver.scheduler.pause("retract")
        driver.scheduler.resume()
        driver.run()
        driver.assert_empty()
    assert len(driver.finals) == 120
