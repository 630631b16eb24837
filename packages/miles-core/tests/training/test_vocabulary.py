import multiprocessing
from functools import partial

import torch
import torch.distributed as dist

from miles.core.math.logprobs import linear_logprobs
from miles.core.training.vocabulary import GroupVocabularyShard

torch.set_num_threads(1)  # forked children cannot use the parent's thread pool
HIDDEN_TD = torch.linspace(-1, 1, 12).view(4, 3)
WEIGHT_VD = torch.linspace(2, -1, 18).view(6, 3).sin()
TARGET_T = torch.tensor([0, 2, 3, 5])


def scores_of(rank, directory):
    dist.init_process_group("gloo", store=dist.FileStore(str(directory / "store"), 2), rank=rank, world_size=2)
    hidden_TD = HIDDEN_TD.clone().requires_grad_()
    shard = GroupVocabularyShard(dist.group.WORLD, first=3 * rank)
    scores = linear_logprobs(
        hidden_TD, WEIGHT_VD[3 * rank : 3 * rank + 3], TARGET_T, with_entropy=True, chunk_size=3, shard=shard
    )
    sum(x.sum() for x in scores).backward()
    return [x.tolist() for x in (scores.logp_T, scores.entropy_T, hidden_TD.grad)]


def test_two_processes_score_like_one(tmp_path):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        first, second = pool.map_async(partial(scores_of, directory=tmp_path), range(2), chunksize=1).get(timeout=60)
    hidden_TD = HIDDEN_TD.clone().requires_grad_()
    scores = linear_logprobs(hidden_TD, WEIGHT_VD, TARGET_T, with_entropy=True)
    sum(x.sum() for x in scores).backward()
    assert first == second
    torch.testing.assert_close([torch.tensor(x) for x in first], [scores.logp_T, scores.entropy_T, hidden_TD.grad])
