"""Graph to graph: the pass contract, the manager, the analyses, and the passes."""

if __name__ != "graphopt.passes":
    raise ImportError(f"expected the import name graphopt.passes, got {__name__}: write the former")
