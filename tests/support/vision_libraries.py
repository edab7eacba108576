"""torchvision, open_clip and timm for the tests that need them, in a process that asks for them.

There may be no torchvision whose operators match a CPU build of torch. Its Python part is enough here, once the two
operators that it registers fake kernels for are declared. They are kept out of the other tests' environment, because
transformers imports whatever torchvision it finds. By hand:

    PYTHONPATH=tests/support python -m pytest -p vision_libraries tests/vision/check_open_clip.py
"""

import sys
from pathlib import Path

FOLDER = Path(sys.prefix) / "vision"


def pytest_configure() -> None:
    """As a plugin of pytest: before any test file is imported."""
    enable()


def enable() -> None:
    """Put the libraries on the path and declare what torchvision lacks."""
    import torch

    sys.path.insert(0, str(FOLDER))
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
    enable.library = library  # operators live as long as it does
