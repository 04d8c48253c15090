"""What a training loop needs to spend compute where it matters, and to know what it spent.

Schedules follow a clock of operations, a ledger counts them, samples that are learned come less
often, batches of small images hold more of them, sparse blocks move; all of it resumes exactly, on
one machine and on many. `recover` trains what was compressed after the model it came from.
"""

from graphopt.training.block_topology import BlockTopology
from graphopt.training.clock import ComputeClock
from graphopt.training.dense_finish import densify_in_place
from graphopt.training.density_schedule import DensitySchedule
from graphopt.training.distill import Teacher, distill
from graphopt.training.even_batches import EvenBatches
from graphopt.training.executed_flops import ExecutedFlops
from graphopt.training.frozen_depth import DepthProbe, choose_frozen_depth
from graphopt.training.ledger import Entry, Ledger
from graphopt.training.prefix_cache import PrefixCache
from graphopt.training.ranks import in_step
from graphopt.training.recover import recover
from graphopt.training.recovery_report import (
    Judgement,
    RecoveryPoint,
    RecoveryReport,
    recovery_of,
)
from graphopt.training.sample_gate import SampleGate
from graphopt.training.sample_ids import WithSampleIds
from graphopt.training.saved_training import load_training, save_training

__all__ = [
    "BlockTopology",
    "ComputeClock",
    "DensitySchedule",
    "DepthProbe",
    "Entry",
    "EvenBatches",
    "ExecutedFlops",
    "Judgement",
    "Ledger",
    "PrefixCache",
    "RecoveryPoint",
    "RecoveryReport",
    "SampleGate",
    "Teacher",
    "WithSampleIds",
    "choose_frozen_depth",
    "densify_in_place",
    "distill",
    "in_step",
    "load_training",
    "recover",
    "recovery_of",
    "save_training",
]
