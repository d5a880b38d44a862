"""regrow: train transformers whose weights are always sparse."""

from regrow import methods, optim, training
from regrow.errors import RegrowError
from regrow.nn import BlockSparseLinear, densify, sparsify
from regrow.topology import BlockTopology, TopologyUpdate
from regrow.training import TopologyUpdater, UpdateRecord, UpdateSchedule

__version__ = "0.1.0"

__all__ = [
    "BlockSparseLinear",
    "BlockTopology",
    "RegrowError",
    "TopologyUpdate",
    "TopologyUpdater",
    "UpdateRecord",
    "UpdateSchedule",
    "densify",
    "methods",
    "optim",
    "sparsify",
    "training",
]
