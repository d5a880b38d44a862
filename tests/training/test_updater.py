"""One place applies an update: survivors bitwise untouched, newcomers at zero, every number logged right."""

import copy

import pytest
import torch
from torch import nn

from regrow import BlockSparseLinear, RegrowError, TopologyUpdate, TopologyUpdater, UpdateSchedule, sparsify
from regrow.optim import AdamW
from regrow.training.updater import apply_update


def model_and_optimizer(optimizer: type = torch.optim.AdamW) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    sparsify(model, density=0.3, block_size=8)
    return model, optimizer(model.parameters(), lr=0.01)


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_moments_of_survivors_equal_those_of_a_never_moved_twin(optimizer: type) -> None:
    model, opt = model_and_optimizer(optimizer)
    schedule = UpdateSchedule(40, 8, 0.5)
    updater = TopologyUpdater(model, opt, schedule=schedule, seed=5)
    n_updates = 0
    for step in range(40):
        give_gradients(model, step)
        twin, twin_opt = copy.deepcopy((model, opt))
        opt.step()
        before = {name: layer.topology.keys() for name, layer in updater.layers.items()}
        records = updater.step()
        if not records:
            continue
        n_updates += 1
        give_gradients(twin, step)  # a copy of a parameter has no gradient
        twin_opt.step()  # the twin takes the same step and never moves
        for name, layer in updater.layers.items():
            twin_values = twin.get_parameter(f"{name}.values")
            fresh = layer.values.flatten(1).eq(0).all(1)
            assert int(fresh.sum()) == next(r.n_moved for r in records if r.layer == name)
            assert torch.equal(layer.topology.keys()[~fresh], before[name][~fresh])
            assert torch.equal(layer.values[~fresh], twin_values[~fresh])
            states = [
                (opt.state[layer.values][key], twin_opt.state[twin_values][key])
                for key, entry in opt.state[layer.values].items()
                if entry.dim() == 3
            ]
            assert states
            for state, twin_state in states:
                assert torch.equal(state[~fresh], twin_state[~fresh])
                assert not state[fresh].any()
                assert twin_state[fresh].any()
    assert n_updates == 7


def test_the_number_of_blocks_is_constant_and_the_log_is_right() -> None:
    model, opt = model_and_optimizer()
    updater = TopologyUpdater(model, opt, schedule=UpdateSchedule(40, 8, 0.5), seed=5)
    explored = {name: set(layer.topology.keys().tolist()) for name, layer in updater.layers.items()}
    fresh_keys: dict[str, set] = {name: set() for name in explored}
    n_blocks = {name: layer.values.shape[0] for name, layer in updater.layers.items()}
    for step in range(40):
        give_gradients(model, step)
        opt.step()
        before = {name: layer.topology.keys().tolist() for name, layer in updater.layers.items()}
        for record in updater.step():
            after = updater.layers[record.layer].topology.keys().tolist()
            moved = [k for k, (a, b) in enumerate(zip(before[record.layer], after, strict=True)) if a != b]
            explored[record.layer] |= set(after)
            assert record.step == step + 1
            assert record.n_moved == round(record.fraction * n_blocks[record.layer]) >= len(moved)
            assert record.coverage == pytest.approx(len(explored[record.layer]) / 128)
            assert record.churn == pytest.approx(len(set(after) - set(before[record.layer])) / len(after))
            values = updater.layers[record.layer].values
            slots = values.flatten(1).eq(0).all(1).nonzero().flatten().tolist()
            gone = {before[record.layer][slot] for slot in slots}
            expected = len(gone & fresh_keys[record.layer]) / len(gone)
            assert record.fresh_removed == pytest.approx(expected)
            fresh_keys[record.layer] = {after[slot] for slot in slots}
            assert values.shape[0] == n_blocks[record.layer]
    assert updater.coverage == pytest.approx(sum(map(len, explored.values())) / 256)


def test_same_seed_same_updates_and_the_global_random_state_is_untouched() -> None:
    patterns = []
    for _ in range(2):
        model, opt = model_and_optimizer()
        updater = TopologyUpdater(model, opt, schedule=UpdateSchedule(6, 3, 0.5), seed=9)
        torch.manual_seed(len(patterns))  # whatever the process has drawn before
        state = torch.get_rng_state()
        for step in range(6):
            give_gradients(model, step)
            opt.step()
            updater.step()
        assert torch.equal(torch.get_rng_state(), state)
        patterns.append([layer.topology.keys() for layer in updater.layers.values()])
    assert all(torch.equal(a, b) for a, b in zip(*patterns, strict=True))


def test_state_dict_resumes_exactly() -> None:
    model, opt = model_and_optimizer()
    schedule = UpdateSchedule(30, 6, 0.5)
    updater = TopologyUpdater(model, opt, schedule=schedule, seed=1)
    for step in range(13):
        give_gradients(model, step)
        opt.step()
        updater.step()
    twin, twin_opt = copy.deepcopy((model, opt))
    resumed = TopologyUpdater(twin, twin_opt, schedule=schedule, seed=1)
    resumed.load_state_dict(updater.state_dict())
    for step in range(13, 30):
        give_gradients(model, step)
        give_gradients(twin, step)
        opt.step()
        twin_opt.step()
        assert updater.step() == resumed.step()
    for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_foreign_or_damaged_state_is_refused() -> None:
    model, opt = model_and_optimizer()
    updater = TopologyUpdater(model, opt, schedule=UpdateSchedule(30, 6, 0.5))
    state = updater.state_dict()
    with pytest.raises(RegrowError, match=r"entry '0.explored' is missing or unknown"):
        updater.load_state_dict({k: v for k, v in state.items() if k != "0.explored"})
    with pytest.raises(RegrowError, match=r"'0.allocated_at' must be torch.int32 \[38\]"):
        updater.load_state_dict(state | {"0.allocated_at": torch.zeros(3)})


def test_a_model_or_optimizer_that_cannot_be_rewired_is_refused() -> None:
    schedule = UpdateSchedule(10, 2)
    dense = nn.Linear(16, 16)
    with pytest.raises(RegrowError, match="no BlockSparseLinear"):
        TopologyUpdater(dense, torch.optim.AdamW(dense.parameters()), schedule=schedule)
    sparse = nn.Sequential(BlockSparseLinear(16, 16, block_size=4, density=0.5))
    with pytest.raises(RegrowError, match=r"does not hold 0\.values"):
        TopologyUpdater(sparse, torch.optim.AdamW(dense.parameters()), schedule=schedule)


def test_group_lasso_acts_after_every_step_with_the_current_rate() -> None:
    from regrow.methods import create

    model, opt = model_and_optimizer()
    method = create("dynsparse", group_lasso=3.0)
    updater = TopologyUpdater(model, opt, method, schedule=UpdateSchedule(10, 2))
    opt.param_groups[0]["lr"] = 0.5
    expected = [layer.values.detach().clone() for layer in updater.layers.values()]
    for values in expected:
        method.regularise_(values, lr=0.5)
    before = [layer.values.detach().clone() for layer in updater.layers.values()]
    updater.step()
    for layer, values, old in zip(updater.layers.values(), expected, before, strict=True):
        assert torch.equal(layer.values, values)
        assert layer.values.norm() < old.norm()


def test_a_layer_that_changes_its_size_keeps_values_and_moments_of_survivors() -> None:
    model, opt = model_and_optimizer(AdamW)
    give_gradients(model, 0)
    opt.step()
    layer, other = model[0], model[2].values
    old_values, old_state = layer.values.detach().clone(), {k: v.clone() for k, v in opt.state[layer.values].items()}
    group = next(g for g in opt.param_groups if any(p is layer.values for p in g["params"]))
    place = [p is layer.values for p in group["params"]].index(True)
    free = layer.topology.free_positions(2, torch.Generator().manual_seed(0))
    update = TopologyUpdate(torch.tensor([3, 9, 4, 30]), free // 8, free % 8)
    kept = apply_update(layer, update, opt)
    n = len(old_values) - 2
    assert layer.values.shape[0] == layer.topology.n_blocks == n and len(kept) == n
    assert not layer.values[3].any() and not layer.values[kept.tolist().index(9)].any()
    survivors = [i for i, slot in enumerate(kept.tolist()) if slot not in (3, 9)]
    assert torch.equal(layer.values[survivors], old_values[kept[survivors]])
    state = opt.state[layer.values]
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(state[key][survivors], old_state[key][kept[survivors]]) and not state[key][3].any()
    assert group["params"][place] is layer.values and any(p is other for p in group["params"])
    loss = model(torch.ones(2, 64)).sum()  # autograd, too, knows the new size
    loss.backward()
    opt.step()
    assert layer.values.grad.shape == layer.values.shape


def test_gradients_are_seen_on_update_steps_only() -> None:
    model, opt = model_and_optimizer(AdamW)
    updater = TopologyUpdater(model, opt, "rigl", schedule=UpdateSchedule(12, 3, 0.3))
    hooks = []
    for _ in range(12):
        hooks.append([len(layer._forward_hooks) for layer in updater.layers.values()])
        opt.zero_grad()
        model(torch.randn(5, 3, 64)).square().mean().backward()
        opt.step()
        records = updater.step()
        assert bool(records) == (updater.n_steps in (4, 8))
    assert [any(h) for h in hooks] == [step in (4, 8) for step in range(1, 13)]


@pytest.mark.parametrize("fused", [False, True])
def test_what_rigl_sees_is_the_dense_gradient_before_the_activation(fused: bool) -> None:
    from regrow import densify

    model, opt = model_and_optimizer(AdamW)
    twin = copy.deepcopy(model)
    if fused:
        model[0].activation, model[1] = "gelu", nn.Identity()
    updater, seen = TopologyUpdater(model, opt, "rigl", schedule=UpdateSchedule(2, 2, 0.3)), {}
    updater._capture.see = lambda name, x, g: seen.update({name: g.T @ x})
    updater._capture.start(updater.layers)
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    model(x).square().mean().backward()
    dense = densify(twin)
    dense(x).square().mean().backward()
    for name, gradient in seen.items():
        torch.testing.assert_close(gradient, dense.get_submodule(name).weight.grad, rtol=1e-4, atol=1e-6)
    assert seen.keys() == {"0", "2"}


def test_full_layers_are_left_alone() -> None:
    layer = BlockSparseLinear(16, 16, block_size=4, density=1.0)
    opt = AdamW(layer.parameters())
    updater = TopologyUpdater(layer, opt, schedule=UpdateSchedule(4, 4, 0.5))
    before = layer.values.detach().clone()
    assert [updater.step() for _ in range(4)] == [[]] * 4 and torch.equal(layer.values, before)


def test_what_no_update_could_do_is_refused_before_the_first_step() -> None:
    model, opt = model_and_optimizer()
    with pytest.raises(RegrowError, match=r"never updates the topology \(n_updates=1"):
        TopologyUpdater(model, opt, schedule=UpdateSchedule(10, 1))
    TopologyUpdater(model, opt, "static", schedule=UpdateSchedule(10, 1))
    with pytest.raises(RegrowError, match=r"LBFGS keeps state '[a-z_]+' of .* cannot be mapped to blocks"):
        TopologyUpdater(model, torch.optim.LBFGS(model.parameters()), schedule=UpdateSchedule(10, 2))
    sparse = nn.Sequential(BlockSparseLinear(64, 512, block_size=8, density=38 / 512))
    with pytest.raises(RegrowError, match="0: 38 blocks leave less than one for each"):
        TopologyUpdater(sparse, AdamW(sparse.parameters()), "srigl", schedule=UpdateSchedule(10, 2))
