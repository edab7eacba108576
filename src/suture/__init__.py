"""Merge fine-tuned models into one, then close the representation gap.

    checkpoints → task vectors → merge → repair → evaluate → report

Every verb of the command line is one call here. `__init__.pyi` lists the public names; each is imported, and torch with
it, when it is first used.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
