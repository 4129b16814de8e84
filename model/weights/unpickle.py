"""Runs alone in a subprocess: `python -I unpickle.py <pickle> <safetensors>`, tensors only.

torch's `weights_only` unpickler builds nothing but tensors and plain containers; whatever else the file asks
for is refused, and nothing is tried a second time in a weaker way. The parent sees an exit code and one line.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save_file

REFUSED = 3
UNREADABLE = 4


def main(source: str, target: str) -> int:
    """Converts; returns the exit code and writes the reason to stderr."""
    try:
        with open(source, "rb") as file:  # an open file, because torch goes by the suffix of a name
            content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        print(_reason(error), file=sys.stderr)
        return REFUSED
    except Exception as error:  # a broken archive surfaces as many types
        print(f"{type(error).__name__}: {_reason(error)}", file=sys.stderr)
        return UNREADABLE
    if isinstance(content, Mapping):
        content = content.get("state_dict", content)
    if not isinstance(content, Mapping):
        print(f"holds a {type(content).__name__}, not a mapping of tensors", file=sys.stderr)
        return UNREADABLE
    tensors = {
        str(key): value.clone().contiguous() for key, value in content.items() if torch.is_tensor(value)
    }
    if not tensors:
        print("holds no tensors", file=sys.stderr)
        return UNREADABLE
    save_file(tensors, target)
    return 0


def _reason(error: Exception) -> str:
    """The line of torch's advice that says what was found, not the ones that say how to run it anyway."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next(
        (line for line in lines if "GLOBAL" in line or "Unsupported" in line), lines[0] if lines else ""
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
