"""Indices: they always describe exactly the coordinates they were given, whatever is done to them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regrow import BlockTopology, RegrowError, TopologyUpdate
from regrow.topology.sampling import sample_distinct, sample_free


@st.composite
def topologies(draw: st.DrawFn) -> BlockTopology:
    rows, cols = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    n_blocks = draw(st.integers(1, rows * cols))
    return BlockTopology.random(rows, cols, n_blocks, torch.Generator().manual_seed(draw(st.integers(0, 99))))


def assert_consistent(topology: BlockTopology) -> None:
    """CSR and coordinates tell the same story."""
    rows, cols = topology.coordinates()
    n, (row_ptr, col_idx, slot) = topology.n_blocks, topology.indices()
    assert len(set(zip(rows.tolist(), cols.tolist(), strict=True))) == n
    assert row_ptr[0] == 0 and row_ptr[-1] == n
    assert sorted(slot.tolist()) == list(range(n))
    for row in range(topology.n_block_rows):
        entries = range(int(row_ptr[row]), int(row_ptr[row + 1]))
        assert col_idx[list(entries)].tolist() == sorted(cols[rows == row].tolist())
        assert all(rows[slot[e]] == row and cols[slot[e]] == col_idx[e] for e in entries)


@given(topologies())
def test_random_topology_is_consistent(topology: BlockTopology) -> None:
    assert_consistent(topology)
    topology.validate()


@given(topologies(), st.integers(0, 99))
def test_reallocation_moves_the_named_slots_and_no_other(topology: BlockTopology, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    k = int(torch.randint(topology.n_blocks + 1, (), generator=generator))
    slots = sample_distinct(topology.n_blocks, k, generator)
    before = topology.keys()
    survivors = torch.ones(topology.n_blocks, dtype=torch.bool)
    survivors[slots] = False
    positions = topology.free_positions(k, generator, occupied=before[survivors])
    cols = topology.n_block_cols
    topology.reallocate(TopologyUpdate(slots, positions // cols, positions % cols))
    assert_consistent(topology)
    after = topology.keys()
    assert torch.equal(after[survivors], before[survivors])
    assert torch.equal(after[slots], positions)


@given(topologies(), st.integers(0, 99))
def test_a_layer_grows_and_shrinks_around_its_survivors(topology: BlockTopology, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    before, n, cols = topology.keys(), topology.n_blocks, topology.n_block_cols
    slots = sample_distinct(n, int(torch.randint(n, (), generator=generator)), generator)
    free = topology.n_positions - n
    positions = topology.free_positions(int(torch.randint(free + 1, (), generator=generator)), generator)
    update = TopologyUpdate(slots, positions // cols, positions % cols)
    kept = topology.reallocate(update)
    assert_consistent(topology)
    assert topology.n_blocks == n + update.growth == len(kept) + max(update.growth, 0)
    expected = before.clone()
    expected[slots[: update.n_moved]] = positions[: update.n_moved]
    assert torch.equal(topology.keys(), torch.cat([expected[kept], positions[update.n_moved :]]))
    assert kept.tolist() == sorted(set(range(n)) - set(slots[update.n_moved :].tolist()))


def test_an_update_that_leaves_nothing_is_refused() -> None:
    topology, empty = BlockTopology.random(2, 2, 2), torch.empty(0, dtype=torch.int64)
    with pytest.raises(RegrowError, match="n_blocks must lie between 1 and 4"):
        topology.reallocate(TopologyUpdate(torch.tensor([0, 1]), empty, empty))
    assert topology.n_blocks == 2


def test_state_dict_round_trip() -> None:
    source = BlockTopology.random(6, 7, 20, torch.Generator().manual_seed(0))
    target = BlockTopology(6, 7, 20)
    target.load_state_dict(source.state_dict())
    assert set(source.state_dict()) == {"row_ptr", "col_idx", "slot"}
    for name, array in source.named_buffers():
        assert torch.equal(array, target.get_buffer(name)), name


@pytest.mark.parametrize(
    ("name", "position", "value", "message"),
    [
        ("col_idx", 0, 99, r"topology\.col_idx must lie in \[0, 3\), found"),
        ("col_idx", 0, -1, "col_idx must lie in"),
        ("slot", 1, 99, r"slot must lie in \[0, 4\)"),
        ("slot", 1, 0, "slot must name every row"),
        ("row_ptr", 1, 99, "row_ptr must rise"),
        ("row_ptr", -1, 3, "row_ptr must rise"),
        ("col_idx", 1, 0, "ascend strictly"),
    ],
)
def test_damaged_indices_are_refused_by_name(name: str, position: int, value: int, message: str) -> None:
    module = torch.nn.Module()
    module.topology = BlockTopology.from_coordinates([0, 0, 1, 1], [0, 1, 0, 2], n_block_rows=2, n_block_cols=3)
    state = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    state[f"topology.{name}"][position] = value
    with pytest.raises(RegrowError, match=message):
        module.load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool])
@pytest.mark.parametrize("assign", [False, True])
def test_indices_of_another_dtype_are_refused(dtype: torch.dtype, assign: bool) -> None:
    topology = BlockTopology.random(2, 3, 4)
    state = {**topology.state_dict(), "slot": topology.slot.to(dtype)}
    with pytest.raises(RegrowError, match="slot must be int32"):
        topology.load_state_dict(state, assign=assign)
    topology.slot = topology.slot.to(dtype)
    with pytest.raises(RegrowError, match=r"slot must be int32 \[4\]"):
        topology.validate()


def test_part_of_a_state_is_validated_too() -> None:
    topology = BlockTopology.from_coordinates([0, 1], [0, 2], n_block_rows=2, n_block_cols=3)
    topology.load_state_dict({"col_idx": torch.tensor([1, 0], dtype=torch.int32)}, strict=False)
    with pytest.raises(RuntimeError, match="col_idx must lie in"):
        topology.load_state_dict({"col_idx": torch.tensor([1, 3], dtype=torch.int32)}, strict=False)
    with pytest.raises(RuntimeError, match="Missing key"):
        topology.load_state_dict({"col_idx": torch.tensor([1, 0], dtype=torch.int32)})


@pytest.mark.parametrize(
    ("slots", "rows", "cols", "message"),
    [
        ([0, 0], [0, 1], [2, 2], "one slot twice"),
        ([0], [5], [0], "rows must lie in"),
        ([0], [0], [-1], "cols must lie in"),
        ([7], [0], [2], "slots must lie in"),
        ([0], [1], [2], "share one block position"),
    ],
)
def test_bad_updates_change_nothing(slots: list, rows: list, cols: list, message: str) -> None:
    topology = BlockTopology.from_coordinates([0, 0, 1, 1], [0, 1, 0, 2], n_block_rows=2, n_block_cols=3)
    before = topology.keys()
    with pytest.raises(RegrowError, match=message):
        topology.reallocate(TopologyUpdate(*map(torch.tensor, (slots, rows, cols))))
    assert torch.equal(topology.keys(), before)


def test_update_of_unequal_lengths_is_refused() -> None:
    with pytest.raises(RegrowError, match="one length"):
        TopologyUpdate(torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([0]))


@pytest.mark.parametrize("n_blocks", [0, 7])
def test_number_of_blocks_must_fit(n_blocks: int) -> None:
    with pytest.raises(RegrowError, match="n_blocks must lie between 1 and 6"):
        BlockTopology.random(2, 3, n_blocks)


@given(st.integers(1, 60), st.data())
def test_samples_are_distinct_and_free(n: int, data: st.DataObject) -> None:
    m = data.draw(st.integers(0, n))
    k = data.draw(st.integers(0, n - m))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    occupied = sample_distinct(n, m, generator)
    drawn = sample_free(n, occupied, k, generator)
    assert len(set(drawn.tolist())) == k
    assert not set(drawn.tolist()) & set(occupied.tolist())
    assert all(0 <= position < n for position in drawn.tolist())


def test_sampling_is_uniform() -> None:
    generator, counts = torch.Generator().manual_seed(0), torch.zeros(10)
    occupied = torch.tensor([1, 5, 8])
    for _ in range(4000):
        counts[sample_free(10, occupied, 2, generator)] += 1
    assert counts[occupied].sum() == 0
    free = counts[counts > 0]
    expected = 8000 / 7
    assert len(free) == 7
    assert ((free - expected) ** 2 / expected).sum() < 22.5  # chi-square, 6 degrees of freedom, p = 0.001


def test_sampling_memory_follows_the_result_not_the_positions() -> None:
    drawn = sample_free(2**31 - 1, torch.arange(1000), 1000, torch.Generator().manual_seed(0))
    assert drawn.numel() == 1000 and int(drawn.min()) >= 1000  # a listing of all positions would take 16 GB
