"""Runs: configuration, pools, checks, merging, repairing, scoring, the model card."""

import lazy_loader

__getattr__, __dir__, _ = lazy_loader.attach(__name__, submodules=["config"])  # `suture.config` is public
