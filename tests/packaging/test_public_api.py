"""The public names of each package are a tested artefact."""

from __future__ import annotations

import importlib

import pytest


@pytest.mark.parametrize("package", ["diffray.model", "diffray.pipelines"])
def test_all_is_sorted_complete_and_importable(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__all__ == sorted(module.__all__)
    for name in module.__all__:
        assert getattr(module, name) is not None
