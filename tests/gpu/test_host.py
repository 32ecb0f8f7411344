"""KV blocks in host memory: what is copied out comes back, in the order asked for."""

import random

import pytest

pytest.importorskip("torch")

import torch

from octavo.runtime.cuda.host import HostBlocks, waves


def test_copies_are_as_if_made_in_their_order(device):
    pools = [torch.arange(24.0, device=device).reshape(4, 2, 3) * scale for scale in (1, -2)]
    before = [pool.clone() for pool in pools]
    blocks = HostBlocks(pools, num_blocks=2, first=4)
    blocks.copy([(0, 4), (1, 5), (2, 0), (4, 1), (0, 4), (5, 3), (4, 2)])
    for pool, old in zip(pools, before, strict=True):
        assert torch.equal(pool, torch.stack([old[2], old[0], old[2], old[1]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_blocks_of_any_size_come_back_whole(device, dtype):
    shapes = [(7, 2, 16, 8), (7, 1, 16, 80), (7, 3, 16, 64)]  # the last is more than one program's
    pools = [torch.randn(shape).to(dtype).to(device) for shape in shapes]
    before = [pool.clone() for pool in pools]
    blocks = HostBlocks(pools, num_blocks=6, first=6)
    blocks.copy([(i, 11 - i) for i in range(6)])
    for pool in pools:
        pool[:6].zero_()
    blocks.copy([(11 - i, (i + 1) % 6) for i in range(6)])
    for pool, old in zip(pools, before, strict=True):
        assert torch.equal(pool[:6].float(), old[[5, 0, 1, 2, 3, 4]].float())
        assert torch.equal(pool[6].float(), old[6].float())


def test_host_memory_is_as_much_as_asked_for(device):
    pools = [torch.zeros(3, 2, 16, size, device=device, dtype=torch.bfloat16) for size in (8, 80)]
    blocks = HostBlocks(pools, num_blocks=37, first=3)
    assert blocks._host.nbytes == 37 * (2 * 16 * (8 + 80)) * 2


def test_no_copy_of_a_wave_touches_what_another_writes():
    draw = random.Random(0)
    for _ in range(200):
        pairs = [tuple(draw.sample(range(6), 2)) for _ in range(draw.randint(0, 8))]
        cut = list(waves(pairs))
        assert [pair for wave in cut for pair in wave] == pairs
        for wave in cut:
            written = [target for _, target in wave]
            assert len({*written}) == len(written)
            assert not {source for source, _ in wave} & {*written}
    assert len(list(waves([(0, 8), (1, 9), (2, 10)]))) == 1, "what nobody waits for goes in one launch"
