"""Tensors to tensors: references, operators, and the modules that hold compressed weights."""

if __name__ != "graphopt.kernels":
    raise ImportError(
        f"expected the import name graphopt.kernels, got {__name__}: write the former"
    )
