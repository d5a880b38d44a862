"""regrow: train transformers whose weights are always sparse."""

from regrow import methods, optim, training
from regrow.bert import flops as _flops  # teaches count_flops the BERT models
from regrow.errors import RegrowError
from regrow.nn import BlockSparseLinear, densify, sparsify
from regrow.nn.flops import count_flops
from regrow.nn.flops_report import FlopsReport
from regrow.topology import BlockTopology, TopologyUpdate
from regrow.training import TopologyUpdater, UpdateRecord, UpdateSchedule

__version__ = "0.1.0"

__all__ = [
    "BlockSparseLinear",
    "BlockTopology",
    "FlopsReport",
    "RegrowError",
    "TopologyUpdate",
    "TopologyUpdater",
    "UpdateRecord",
    "UpdateSchedule",
    "count_flops",
    "densify",
    "methods",
    "optim",
    "sparsify",
    "training",
]

del _flops
