"""`import torchvision` works whatever state its compiled operators are in."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from models import compat


def test_torchvision_imports_in_a_fresh_process():
    code = (
        "from models.compat import define_missing_operators as define\n"
        "define(); define()\n"
        "import torchvision.models as zoo, timm\n"
        "print(zoo.list_models(module=zoo)[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "alexnet"


COMPILER = """
import sys, torch
from models.compat import define_missing_operators, without_compiler
define_missing_operators()
disable = torch.compiler.disable
with without_compiler():
    import timm, torchvision
    {within}
print("torch._dynamo" in sys.modules, torch.compiler.disable is disable)
operator = sys.modules["torchvision.ops.roi_align"]
import torch._dynamo.utils as compiler
print(compiler.is_compile_supported("cpu") == operator.is_compile_supported("cpu"))
"""


@pytest.mark.parametrize(
    ("within", "loaded"),
    [("", False), ("sys.modules['torch._dynamo.utils'].counters", True)],
    ids=["not asked", "asked for more"],
)
def test_libraries_are_imported_without_the_compiler_unless_they_need_it(within, loaded):
    code = COMPILER.format(within=within)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(loaded), "True", "True"]


def test_nothing_is_defined_where_the_library_brings_its_operators(monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("defined an operator that exists")

    monkeypatch.setattr(torch.library, "define", refuse)
    monkeypatch.setattr(compat, "_load_own_operators", lambda: True)
    compat.define_missing_operators()


def test_only_missing_operators_are_defined(monkeypatch):
    defined = []
    monkeypatch.setattr(compat, "_load_own_operators", lambda: False)
    monkeypatch.setattr(compat, "_SCHEMAS", {"made_up_operator": "(Tensor x) -> Tensor"})
    monkeypatch.setattr(torch.library, "define", lambda *arguments: defined.append(arguments))
    compat.define_missing_operators()
    assert defined == [("torchvision::made_up_operator", "(Tensor x) -> Tensor")]


@pytest.mark.parametrize("content", [b"", b"not a shared library"])
def test_a_library_that_does_not_load_is_passed_over(monkeypatch, tmp_path, content):
    (tmp_path / "_C.so").write_bytes(content)
    (tmp_path / "__init__.py").touch()

    class Spec:
        origin = str(tmp_path / "__init__.py")

    monkeypatch.setattr(compat, "find_spec", lambda _: Spec)
    compat._load_own_operators()
