"""A training step of a sparse layer never holds anything of a dense weight's size."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from regrow import BlockSparseLinear

from ..allocations import LargestTensor


def test_no_tensor_of_in_x_out_elements_in_a_traced_step() -> None:
    layer = BlockSparseLinear(1024, 1024, block_size=16, density=0.1)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    x = torch.randn(64, 1024, requires_grad=True)
    with LargestTensor() as largest:
        for _ in range(2):
            layer(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert layer.values.numel() <= largest.elements < 1024 * 1024 / 2


@pytest.mark.parametrize("b", [1, 4, 8, 16, 32])
def test_training_state_is_proportional_to_the_density(b: int) -> None:
    """Values, gradient and Adam's two moments are ``4 b^2`` numbers a block; beside them it has two indices."""
    layer = BlockSparseLinear(512, 2048, block_size=b, density=0.1, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.randn(4, 512)).sum().backward()
    optimizer.step()
    moments = [state for state in optimizer.state[layer.values].values() if state.dim()]
    held = [layer.values, layer.values.grad, *moments, *layer.buffers()]
    assert len(held) == 4 + 3
    dense_state = 4 * 512 * 2048 * layer.values.element_size()
    size = sum(t.numel() * t.element_size() for t in held)
    n_blocks, n_rows = layer.topology.n_blocks, layer.topology.n_block_rows
    assert size == n_blocks * (16 * b * b + 8) + (n_rows + 1) * 4
    assert size <= layer.density * dense_state * {1: 1.6, 4: 1.035}.get(b, 1.03)


STEP = """
import re, torch
from regrow import BlockSparseLinear
def peak(): return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
def train(layer, n):
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    for _ in range(3):
        layer(torch.randn(64, n)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
train(BlockSparseLinear(256, 256, block_size=16, density=0.1), 256)  # whatever the libraries take once
before = peak()
train(BlockSparseLinear(8192, 8192, block_size=16, density=0.1), 8192)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from Linux's /proc")
def test_peak_memory_of_the_process_is_far_below_dense() -> None:
    """Blocks, gradient and two moments are 0.4 of a dense weight; packed copies and activations come on top."""
    run = subprocess.run([sys.executable, "-c", STEP], capture_output=True, text=True, check=True, timeout=300)
    dense_weight = 8192 * 8192 * 4
    assert 0.3 * dense_weight < int(run.stdout) < 0.9 * dense_weight
