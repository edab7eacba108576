"""Merge two of your own checkpoints, any PyTorch files of one architecture: python merge_two.py BASE ONE OTHER OUT"""

import sys

import suture

base, one, other, out = sys.argv[1:]
merged = suture.merge(base, {"one": one, "other": other}, "ties_merging", scaling_factor=0.3)
suture.save_checkpoint(merged, out)
print(f"{len(merged)} tensors in {out}")
