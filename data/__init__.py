"""Extraction, dedup, tagging, decontamination, mixing, packing, the tiny world, real corpora (report 2.1, 3.1, 3.2)."""
