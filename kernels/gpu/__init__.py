"""The operators on CUDA devices: the only folder that imports triton."""
