"""Merge methods: one paper, one file, one function of tensors. The registry finds every module of this package."""
