"""Merge files of any size: sharded checkpoints in, a sharded checkpoint out, in bounded memory, at the disk's speed."""

from suture.file_merge.launching import launch_shares
from suture.file_merge.transplant import transplant
from suture.file_merge.verbs import ConfiguredMerge, merge_configured, merge_files, merge_mergekit, plan_files

__all__ = [
    "ConfiguredMerge",
    "launch_shares",
    "merge_configured",
    "merge_files",
    "merge_mergekit",
    "plan_files",
    "transplant",
]
