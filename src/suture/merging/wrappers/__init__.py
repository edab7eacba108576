"""Wrappers: what is done to the update of any merge; one paper, one file. `wrapping` finds every module here."""
