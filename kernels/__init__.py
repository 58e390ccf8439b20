"""Triton kernels beside their PyTorch references (kept free of imports: see docs/architecture.md)."""
