"""Kernels: one file each, torch reference beside Triton kernel. Importing this package never imports triton."""
