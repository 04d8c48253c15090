"""Training with block-sparse layers: blocks that move, a density that falls, a dense finish."""

from graphopt.training.block_topology import BlockTopology
from graphopt.training.dense_finish import densify_in_place
from graphopt.training.density_schedule import DensitySchedule

__all__ = ["BlockTopology", "DensitySchedule", "densify_in_place"]
