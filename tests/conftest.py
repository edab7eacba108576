import os

import pytest
import torch
from jaxtyping import install_import_hook

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Shapes in signatures are enforced here and nowhere else.
install_import_hook(["suture.adaptation", "suture.merging", "suture.repairs"], "typecheck.checked")

pytest_plugins = ["desk", "pages", "text_shop"]


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path_factory, monkeypatch):
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("SUTURE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
