"""Dropout and LayerNorm as a model uses them: shapes, random state, checkpointing, the module."""

import pytest
import torch
from torch.nn.functional import layer_norm
from torch.utils.checkpoint import checkpoint

from regrow.errors import RegrowError
from regrow.nn import DropoutAddNorm, dropout, dropout_add_norm


def state() -> torch.Tensor:
    return torch.get_rng_state()


def layer(p: float = 0.0) -> DropoutAddNorm:
    torch.manual_seed(1)
    made = DropoutAddNorm(24, p=p)
    with torch.no_grad():
        made.weight.normal_()
        made.bias.normal_()
    return made


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 0, 4)])
@pytest.mark.parametrize("with_residual", [True, False])
def test_any_leading_dimensions(lead: tuple[int, ...], with_residual: bool) -> None:
    norm, x = layer(), torch.randn(*lead, 24)
    residual = torch.randn(*lead, 24) if with_residual else None
    expected = layer_norm(x + residual if with_residual else x, (24,), norm.weight, norm.bias, 1e-12)
    torch.testing.assert_close(norm(x, residual), expected)


def test_nothing_is_drawn_where_nothing_is_dropped() -> None:
    x, residual, before = torch.randn(4, 24), torch.randn(4, 24), state()
    layer_, layer_p = layer(), layer(0.5).eval()
    torch.set_rng_state(before)
    for made in (layer_, layer_p):
        made(x, residual)
    assert dropout(x, 0.0) is x
    assert dropout(x, 0.5, training=False) is x
    assert torch.equal(state(), before)
    dropout_add_norm(x, residual, layer_.weight, layer_.bias, p=0.5, training=False)
    assert torch.equal(state(), before)


def test_the_random_state_gives_the_mask() -> None:
    norm, x, residual, before = layer(0.3), torch.randn(40, 24), torch.randn(40, 24), state()
    first, second = norm(x, residual), norm(x, residual)
    after = state()
    torch.set_rng_state(before)
    assert torch.equal(first, norm(x, residual))
    assert torch.equal(second, norm(x, residual))
    assert torch.equal(state(), after)
    assert not torch.equal(first, second)
    torch.set_rng_state(before)
    torch.randint(2**63 - 1, ())
    torch.randint(2**63 - 1, ())
    assert torch.equal(state(), after)  # one draw a call


def test_checkpointing_repeats_the_mask() -> None:
    norm, x = layer(0.3), torch.randn(40, 24, requires_grad=True)

    def block(x: torch.Tensor) -> torch.Tensor:
        return norm(dropout(x, 0.2) * 2, x)

    results = []
    for reentrant in (None, False, True):
        torch.manual_seed(5)
        y = block(x) if reentrant is None else checkpoint(block, x, use_reentrant=reentrant)
        torch.rand(3)  # moves the state before the block is computed again
        x.grad = None
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_dropout_keeps_the_mean() -> None:
    torch.manual_seed(0)
    y = dropout(torch.ones(1000, 100), 0.1)
    assert abs(y.mean() - 1) < 0.01
    torch.testing.assert_close(y.unique(), torch.tensor([0.0, 65536 / (65536 - 6554)]))


def test_parameters_are_those_of_layer_norm() -> None:
    theirs = torch.nn.LayerNorm(24)
    with torch.no_grad():
        theirs.weight.normal_()
    ours = DropoutAddNorm(24, p=0.1)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.weight, theirs.weight)
    assert isinstance(ours, torch.nn.LayerNorm)  # so weight decay leaves it out wherever LayerNorm is left out
    assert repr(ours) == "DropoutAddNorm(24, eps=1e-12, p=0.1)"


def test_autocast_computes_in_the_dtype_of_the_weight() -> None:
    norm, x = layer(), torch.randn(3, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = norm(x.bfloat16(), x)
    assert y.dtype is torch.float32
    torch.testing.assert_close(y, norm(x.bfloat16().float(), x))


def test_bad_arguments_are_named() -> None:
    norm, x = layer(), torch.randn(4, 24)
    with pytest.raises(RegrowError, match="residual is"):
        norm(x, x[1:])
    with pytest.raises(RegrowError, match="weight is"):
        norm(x[:, 1:])
    with pytest.raises(RegrowError, match="p is"):
        DropoutAddNorm(24, p=1.0)
    with pytest.raises(RegrowError, match="p is"):
        dropout(x, -0.1)
    with pytest.raises(RegrowError, match="p is"):
        dropout_add_norm(x, x, norm.weight, norm.bias, p=2.0, training=False)
