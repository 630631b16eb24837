"""Reward functions as users write them."""

import asyncio


async def coroutine(args, sample, **kwargs):
    return float(sample.label)


class Instance:
    async def __call__(self, args, sample, **kwargs):
        return sample.response_length


instance = Instance()


async def never(args, sample, **kwargs):
    await asyncio.sleep(1000)


def plain(args, sample, **kwargs):
    while sample.response == "hang":
        pass
    return float(sample.label)


def flag(args, sample, **kwargs):
    return args.my_value


def fails(args, sample, **kwargs):
    raise KeyError("no such entry")


async def fails_async(args, sample, **kwargs):
    raise KeyError("no such entry")


def nan(args, sample, **kwargs):
    return float("nan")


async def words(args, sample, **kwargs):
    return "good"


def group(args, samples, **kwargs):
    return [float(sample.index) for sample in samples]


async def group_async(args, samples, **kwargs):
    return [float(sample.index) for sample in samples]


async def too_few(args, samples, **kwargs):
    return [1.0]


async def mapping(args, sample):
    return {"grade": "A"}
