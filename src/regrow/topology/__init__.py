"""Which blocks of a weight exist: indices, updates of them, and how many each layer gets."""

from regrow.topology.blocks import BlockTopology
from regrow.topology.distribution import blocks_at_density, layer_densities
from regrow.topology.explored import ExploredPositions
from regrow.topology.update import TopologyUpdate

__all__ = ["BlockTopology", "ExploredPositions", "TopologyUpdate", "blocks_at_density", "layer_densities"]
