"""Slow, plain loops over numbers, written from the papers' equations: no tensors, no shared code with attnzoo."""
