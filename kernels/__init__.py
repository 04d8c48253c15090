"""Tensors to tensors: references, operators, and the modules that hold compressed weights."""

import sys

if __name__ == "graphopt.kernels":
    from .block_layout import BlockLayout
    from .block_sparse_linear import BlockSparseLinear
    from .block_sparse_operator import block_sparse_linear, block_sparse_linear_reference
    from .fused_linear import FusedLinear, FusedPart, fused_linear_reference
    from .gates import Gate
    from .low_rank import LowRankLinear, low_rank_linear_reference
    from .quantized_linear import QuantizedLinear
    from .quantized_operator import quantized_linear, quantized_linear_reference
    from .token_rows import combine_rows, gather_rows, scatter_rows

    __all__ = [
        "BlockLayout",
        "BlockSparseLinear",
        "FusedLinear",
        "FusedPart",
        "Gate",
        "LowRankLinear",
        "QuantizedLinear",
        "block_sparse_linear",
        "block_sparse_linear_reference",
        "combine_rows",
        "fused_linear_reference",
        "gather_rows",
        "low_rank_linear_reference",
        "quantized_linear",
        "quantized_linear_reference",
        "scatter_rows",
    ]
else:
    # transformers looks, by `import_module`, for a package of this name that is not ours. With the
    # repository root on the path it finds this folder: it then gets an empty module without a
    # version, which it takes for "not installed". Everybody else is refused.
    _frame = sys._getframe()
    while _frame.f_back is not None and _frame.f_code.co_name != "import_module":
        _frame = _frame.f_back
    if _frame.f_code.co_name != "import_module":
        raise ImportError(
            f"expected the import name graphopt.kernels, got {__name__}: write the former"
        )
    __path__ = []
    del _frame
