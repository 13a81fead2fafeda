"""Imports that fail on purpose."""

import sys
from typing import Any

import pytest


def fail_import(name: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the import of a module raise an error, until the test ends."""

    class Fails:
        def find_spec(self, wanted: str, *_: Any) -> None:
            if wanted == name:
                raise error

    monkeypatch.setattr(sys, "meta_path", [Fails(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, name, raising=False)
