"""Functions of the parts written in C, which are built as the package is installed where there is a compiler."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
from collections.abc import Callable

logger = logging.getLogger("heatlens.engine")

# Types of arguments.
POINTER = ctypes.c_void_p
INT64 = ctypes.c_int64
INT32 = ctypes.c_int


def find_function(module: str, name: str, *arguments: type) -> Callable[..., int] | None:
    """A function of a module, given its types of arguments; None if the module was not built."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        logger.info(
            "%s was not built, and what it does takes longer: install Heatlens where there is a C compiler",
            module,
        )
        return None
    function: Callable[..., int] = ctypes.CDLL(spec.origin)[name]
    function.argtypes = list(arguments)  # type: ignore[attr-defined]
    return function
