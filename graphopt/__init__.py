"""An optimizing compiler for the cost of PyTorch models that already exist."""

from graphopt import errors as errors
from graphopt import training as training
from graphopt.api import optimize, plan
from graphopt.capture import capture
from graphopt.checkpoint import densify, load, save
from graphopt.export import export_onnx
from graphopt.frontier import frontier
from graphopt.passes.plan import Plan
from graphopt.passes.program import Program
from graphopt.report import report
from graphopt.training.recover import recover

__version__ = "0.1.0"

__all__ = [
    "Plan",
    "Program",
    "__version__",
    "capture",
    "densify",
    "export_onnx",
    "frontier",
    "load",
    "optimize",
    "plan",
    "recover",
    "report",
    "save",
]
