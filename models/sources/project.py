"""Imports modules of a user's project without collisions with ours or with another project's.

A project's modules live in `sys.modules` under a private prefix, and each of them has an `__import__`
of its own that looks in the project first, also when a function imports something later. So a
project may have packages called `models`, `service` or `utils`, and several projects may share one
process.
"""

from __future__ import annotations

import builtins
import hashlib
import importlib
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any


def import_from(root: Path, name: str) -> ModuleType:
    """Import a module by its dotted name: from the folder if it is there, else as usual.

    Raises:
        ModuleNotFoundError: it is in neither place.
        Exception: whatever the module raises.
    """
    project = _project(root.resolve())
    return importlib.import_module(project.private(name) if project.has(name) else name)


class _Project(MetaPathFinder):
    """Finds the modules below a folder under a private prefix."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.prefix = f"_heatlens_{hashlib.blake2b(str(root).encode(), digest_size=6).hexdigest()}"

    def private(self, name: str) -> str:
        """The name in `sys.modules`."""
        return f"{self.prefix}.{name}"

    def has(self, name: str) -> bool:
        """Whether the project has the top-level module or package of a dotted name."""
        top = name.partition(".")[0]
        folder = self.root / top
        files = (folder.glob(pattern) for pattern in ("*.py", "*/__init__.py"))
        return (self.root / f"{top}.py").is_file() or any(map(any, files))

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        if fullname == self.prefix:
            found = ModuleSpec(fullname, None, is_package=True)
            found.submodule_search_locations = [str(self.root)]
            return found
        if not fullname.startswith(f"{self.prefix}."):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(self, fullname, spec.loader.path)
        return spec

    def import_(
        self,
        name: str,
        globals: Mapping[str, object] | None = None,  # noqa: A002 # the names of `__import__`
        locals: Mapping[str, object] | None = None,  # noqa: A002
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        """The `__import__` of the project's modules."""
        if level or not self.has(name):
            return builtins.__import__(name, globals, locals, fromlist or (), level)
        importlib.import_module(self.private(name))
        if not fromlist:
            return sys.modules[self.private(name.partition(".")[0])]
        # The built-in function imports submodules named by `from package import submodule`.
        return builtins.__import__(self.private(name), globals, locals, fromlist, 0)


class _Loader(SourceFileLoader):
    """Gives a module the project's `__import__`."""

    def __init__(self, project: _Project, fullname: str, path: str) -> None:
        super().__init__(fullname, path)
        self._project = project

    def exec_module(self, module: ModuleType) -> None:
        """See `importlib.abc.Loader`."""
        scope: dict[str, Any] = {**vars(builtins), "__import__": self._project.import_}
        module.__dict__["__builtins__"] = scope
        super().exec_module(module)


def _project(root: Path) -> _Project:
    for finder in sys.meta_path:
        if isinstance(finder, _Project) and finder.root == root:
            return finder
    project = _Project(root)
    sys.meta_path.insert(0, project)
    return project
