"""Which positions were used, and new ones drawn fairly."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from regrow.topology import ExploredPositions
from regrow.topology.sampling import sample_distinct, sample_free_by_group


@given(st.integers(1, 300), st.data())
def test_new_positions_are_distinct_and_new(n: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    used = sample_distinct(n, data.draw(st.integers(0, n)), generator)
    explored = ExploredPositions(n)
    explored.add(used)
    k = data.draw(st.integers(0, n))
    new = explored.sample_new(k, generator)
    assert len(new) == min(k, n - len(used)) == len(set(new.tolist()))
    assert not set(new.tolist()) & set(used.tolist()) and all(0 <= p < n for p in new.tolist())
    assert explored.contains(used).all() and not explored.contains(new).any()


def test_new_positions_are_uniform_whether_listed_or_drawn() -> None:
    for k in (1, 9):  # 36 free positions: one is drawn until it is new, nine are taken from a list
        generator, counts = torch.Generator().manual_seed(0), torch.zeros(50)
        explored = ExploredPositions(50)
        explored.add(torch.arange(0, 42, 3))
        for _ in range(3600 // k):
            counts[explored.sample_new(k, generator)] += 1
        free = counts[~explored.contains(torch.arange(50))]
        assert len(free) == 36 and counts.sum() == 3600
        assert ((free - 100) ** 2 / 100).sum() < 66.6  # chi-square, 35 degrees of freedom, p = 0.001


def test_group_samples_fill_every_group_uniformly() -> None:
    generator, counts = torch.Generator().manual_seed(0), torch.zeros(3, 6)
    occupied, wanted = torch.tensor([0, 7, 8]), torch.tensor([2, 0, 6])
    for _ in range(1500):
        drawn = sample_free_by_group(6, occupied, wanted, generator)
        assert torch.bincount(drawn // 6, minlength=3).tolist() == [2, 0, 6]
        counts.view(-1)[drawn] += 1
    assert counts[0, 0] == 0 and (counts[2] == 1500).all()
    assert ((counts[0, 1:] - 600) ** 2 / 600).sum() < 18.5  # chi-square, 4 degrees of freedom, p = 0.001
