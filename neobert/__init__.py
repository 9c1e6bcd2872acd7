"""NeoBERT: a packed encoder on fused kernels."""
