"""Keeps torch's compiler and torchvision's models out of processes that use neither.

Every optimiser of torch calls ``torch._dynamo.disable`` and ``graph_break`` for its methods, and torchvision takes a
name from there, and all of its models and data sets, while it is imported. Importing the compiler takes longer than
importing torch itself, so stand-ins have these names until something asks for any other.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any


class _Deferred(ModuleType):
    """A module that is imported when one of its names is asked for, but for those that eager code calls."""

    def __init__(self, name: str, **eager: Any) -> None:
        super().__init__(name)
        vars(self).update(eager)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and (name != "__path__" or self.__name__ == "torch._dynamo.utils"):
            raise AttributeError(name)  # inspect looks into all modules; an import of a sub-module wants the path
        for own in [own for own, module in sys.modules.items() if isinstance(module, _Deferred)]:
            del sys.modules[own]
        return getattr(importlib.import_module(self.__name__), name)


def _unchanged(function: Callable[..., Any], *_: Any, **__: Any) -> Callable[..., Any]:
    return function


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _is_compile_supported(device_type: str) -> Any:
    importlib.import_module("torch._dynamo").config  # noqa: B018  # any other name brings the real modules
    return importlib.import_module("torch._dynamo.utils").is_compile_supported(device_type)


def defer() -> None:
    """Put off the import of these modules, if it has not happened yet, to their first use."""
    if "torch._dynamo" not in sys.modules:
        sys.modules["torch._dynamo"] = _Deferred(
            "torch._dynamo",
            disable=_unchanged,
            graph_break=_nothing,
            trace_rules=SimpleNamespace(clear_lru_cache=_nothing),  # a new process group asks for it
        )
        sys.modules["torch._dynamo.utils"] = _Deferred(
            "torch._dynamo.utils", is_compile_supported=_is_compile_supported
        )
    for name in ("torchvision.models", "torchvision.datasets"):
        if "torchvision" not in sys.modules:
            sys.modules.setdefault(name, _Deferred(name))
