import asyncio

from miles.rollout.turns import Turns


async def rounds(turns: Turns, count: int) -> list[int]:
    """In which turn of the loop each of ``count`` coroutines went on."""
    turn, went_on = 0, []

    async def one() -> None:
        await turns.take()
        went_on.append(turn)

    tasks = [asyncio.create_task(one()) for _ in range(count)]
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0)
        turn += 1
        assert turn < 1000
    return went_on


async def test_no_turn_of_the_loop_takes_more_than_its_share() -> None:
    turns = Turns(per_turn=3)
    for _ in range(2):
        went_on = await rounds(turns, 10)
        assert len(went_on) == 10
        assert went_on == sorted(went_on)
        assert max(went_on.count(turn) for turn in went_on) <= 4  # a turn's end and the next one's beginning may meet
        await asyncio.sleep(0.01)


async def test_a_few_wait_for_nothing() -> None:
    assert len(set(await rounds(Turns(per_turn=100), 10))) == 1


async def test_who_gave_up_takes_no_place() -> None:
    turns, order = Turns(per_turn=1), []

    async def one(number: int) -> None:
        await turns.take()
        order.append(number)

    tasks = [asyncio.create_task(one(number)) for number in range(4)]
    await asyncio.sleep(0)
    tasks[1].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order == [0, 2, 3]
