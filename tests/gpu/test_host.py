"""KV blocks in host memory: what is copied out comes back, in the order asked for."""

import pytest

pytest.importorskip("torch")

import torch

from octavo.runtime.cuda.host import HostBlocks


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_copies_are_made_in_their_order(where):
    pools = [torch.arange(24.0, device=where).reshape(4, 2, 3) * scale for scale in (1, -2)]
    before = [pool.clone() for pool in pools]
    blocks = HostBlocks(pools, num_blocks=2, first=4)
    blocks.copy([(0, 4), (1, 5), (2, 0), (4, 1), (0, 4), (5, 3), (4, 2)])
    for pool, old in zip(pools, before, strict=True):
        assert torch.equal(pool, torch.stack([old[2], old[0], old[2], old[1]]))
