"""The reference vectors in tests/golden: outputs of published implementations on small random inputs."""

import json
from pathlib import Path

from safetensors.torch import load_file

FOLDER = Path(__file__).parent.parent / "golden"
INDEX = json.loads((FOLDER / "index.json").read_text())


def names(prefix: str) -> list[str]:
    """All cases whose file is here and whose name starts with `prefix`."""
    found = sorted(name for name in INDEX if name.startswith(prefix) and (FOLDER / f"{name}.safetensors").exists())
    assert found, f"no reference vectors named {prefix}* in {FOLDER}"
    return found


def load(name: str) -> tuple[dict, dict, dict[str, dict], dict]:
    """(case, base, models by name, all tensors) of one reference case."""
    tensors = load_file(FOLDER / f"{name}.safetensors")
    part = lambda prefix: {k.removeprefix(f"{prefix}/"): v for k, v in tensors.items() if k.startswith(f"{prefix}/")}
    models = sorted({k.split("/")[0] for k in tensors if k.startswith("model_")}, key=lambda m: int(m[6:]))
    return INDEX[name], part("base"), {model: part(model) for model in models}, tensors
