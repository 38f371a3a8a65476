"""A rank expands and masks its own shard as it would the whole tensor, for any placements on any mesh."""

import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import params, seeds
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

import blockprune as bp
from blockprune.core.sharded_tensor import is_sharded, sharded_like, sharded_mask, whole
from blockprune.model.masking import mask_blocks

RANKS = 4


@st.composite
def placements(draw: st.DrawFn, axes: int) -> tuple[Placement, ...]:
    """On a mesh of one axis or of two; `fully_shard` of a tensor parallel weight shards an axis twice, the other way round."""
    axis = draw(st.integers(0, axes - 1))
    single: st.SearchStrategy[Placement] = st.one_of(st.just(Replicate()), st.integers(0, axes - 1).map(Shard))
    return draw(st.one_of(st.tuples(single), st.tuples(single, single), st.just((_StridedShard(axis, split_factor=2), Shard(axis)))))


@settings(max_examples=60, deadline=None)
@given(st.data(), params(rank=(1, 3)), seeds)
def test_each_rank_has_its_part_of_the_whole_mask(data: st.DataObject, p: bp.Param, seed: int) -> None:
    own = data.draw(placements(len(p.grid.shape)))
    keep = torch.rand(p.grid.size, generator=torch.Generator().manual_seed(seed)) < 0.5
    for rank in range(RANKS):  # a process group that sends nothing: so nothing needs to be sent
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=RANKS)
        try:
            mesh = init_device_mesh("cpu", (RANKS,) if len(own) == 1 else (2, RANKS // 2))
            like = distribute_tensor(p.weight, mesh, own, src_data_rank=None)
            right = distribute_tensor(bp.expand(keep, p.grid), mesh, own, src_data_rank=None)
            assert torch.equal(sharded_mask(keep, p.grid, like).to_local(), right.to_local())
            assert torch.equal(sharded_like(bp.expand(keep, p.grid), like).to_local(), right.to_local())
            masked = distribute_tensor(mask_blocks(p.weight, keep, p.grid), mesh, own, src_data_rank=None)
            assert torch.equal(mask_blocks(like, keep, p.grid).to_local(), masked.to_local())
            assert mask_blocks(like, keep, p.grid).placements == like.placements
            assert is_sharded(like)
        finally:
            dist.destroy_process_group()


def test_plain_tensors_stay_what_they_are() -> None:
    x = torch.ones(2)
    assert not is_sharded(x)
    assert whole(x) is sharded_like(x, torch.zeros(2)) is x
