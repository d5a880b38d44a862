"""The function that layers call."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from regrow.errors import RegrowError
from regrow.nn import attention


def test_as_torch() -> None:
    qkv = torch.randn(2 * 10, 3 * 24, generator=torch.Generator().manual_seed(1))
    q, k, v = qkv.view(2, 10, 3, 3, 8).permute(2, 0, 3, 1, 4)
    expected = scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(20, 24)
    offsets = torch.tensor([0, 10, 20], dtype=torch.int32)
    torch.testing.assert_close(attention(qkv, offsets, 3, p=0.5, training=False), expected)


def test_dropout_follows_torchs_generator() -> None:
    qkv, offsets = torch.ones(30, 48).requires_grad_(), torch.tensor([0, 30], dtype=torch.int32)
    torch.manual_seed(3)
    first = attention(qkv, offsets, 2, p=0.2)
    second = attention(qkv, offsets, 2, p=0.2)
    torch.manual_seed(3)
    assert torch.equal(first, attention(qkv, offsets, 2, p=0.2))
    assert not torch.equal(first, second)
    first.sum().backward()  # of the same mask: the values' gradients add up to the kept shares
    torch.testing.assert_close(qkv.grad[:, 32:].sum(), first.detach().sum())


def test_nothing_is_drawn_where_nothing_is_dropped() -> None:
    qkv, offsets = torch.ones(3, 48), torch.tensor([0, 3], dtype=torch.int32)
    state = torch.get_rng_state()
    attention(qkv, offsets, 2)
    attention(qkv, offsets, 2, p=0.1, training=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_scale() -> None:
    qkv, offsets = torch.randn(6, 48), torch.tensor([0, 6], dtype=torch.int32)
    assert torch.equal(attention(qkv, offsets, 2), attention(qkv, offsets, 2, scale=8**-0.5))
    uniform = attention(qkv, offsets, 2, scale=0.0)
    torch.testing.assert_close(uniform, qkv[:, 32:].mean(0).expand(6, 16))


def test_bad_arguments_are_named() -> None:
    qkv, offsets = torch.ones(3, 48), torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(RegrowError, match="heads"):
        attention(qkv, offsets, 0)
    with pytest.raises(RegrowError, match="p is 1"):
        attention(qkv, offsets, 2, p=1.0, training=False)
