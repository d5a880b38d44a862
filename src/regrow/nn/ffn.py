from torch.nn import functional as F

from regrow import kernels


def sparse_ffn(first, second, x):
    if first._forward_hooks or second._forward_hooks or first.block_size != second.block_size:
        return second(F.gelu(first(x)))
    y = kernels.ffn(
        x.reshape(-1, first.in_features),
        first.values,
        first.bias,
        *first.topology.indices(),
        second.values,
        second.bias,
        *second.topology.indices(),
    )
    return y.view(*x.shape[:-1], second.out_features)
