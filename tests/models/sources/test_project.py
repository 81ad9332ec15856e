"""Projects whose packages have the names of ours, or of each other's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import models
from models.sources.project import import_from


def write(root: Path, **files: str) -> None:
    """Write modules; `__` in a keyword stands for a folder."""
    for name, text in files.items():
        path = root / ((name if "/" in name else name.replace("__", "/")) + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_a_package_called_as_ours(tmp_path: Path) -> None:
    write(tmp_path, models__net="VALUE = 1", service="VALUE = 2")
    assert import_from(tmp_path, "models.net").VALUE == 1
    assert import_from(tmp_path, "service").VALUE == 2
    assert sys.modules["models"] is models
    assert not hasattr(models, "net")


def test_every_form_of_import_finds_the_project(tmp_path: Path) -> None:
    write(
        tmp_path,
        **{"models/__init__": "from models.net import VALUE"},
        models__net="from . import parts\nfrom .parts import PART\nVALUE = parts.PART + PART",
        models__parts="from utils import *\nPART = HELP",
        utils="import utils_more.deep, json\nHELP = utils_more.deep.DEEP\nTEXT = json.dumps(1)",
        utils_more__deep="DEEP = 5",
        entry="import models.net as net, models\nfrom models import parts\n"
        "FOUND = net.VALUE, models.VALUE, parts.PART",
    )
    assert import_from(tmp_path, "entry").FOUND == (10, 10, 5)


def test_an_import_inside_a_function_finds_the_project_later(tmp_path: Path) -> None:
    write(
        tmp_path,
        net="def lazy():\n    from models.late import VALUE\n    import models.types\n"
        "    return VALUE, models.types.KIND",
        models__late="VALUE = 3",
        models__types="KIND = 'mine'",
    )
    lazy = import_from(tmp_path, "net").lazy
    import models.types as ours

    assert lazy() == (3, "mine")
    assert sys.modules["models.types"] is ours


def test_two_projects_do_not_meet(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write(tmp_path / name, net="from models.core import NAME", models__core=f"NAME = {name!r}")
    assert import_from(tmp_path / "first", "net").NAME == "first"
    assert import_from(tmp_path / "second", "net").NAME == "second"
    assert import_from(tmp_path / "first", "models.core").NAME == "first"


def test_what_the_project_lacks_is_imported_as_usual(tmp_path: Path) -> None:
    write(tmp_path, net="import torch, json\nfrom torch import nn\nKIND = nn.Linear")
    from torch import nn

    assert import_from(tmp_path, "net").KIND is nn.Linear
    assert import_from(tmp_path, "json") is sys.modules["json"]
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        import_from(tmp_path, "nowhere")


def test_a_class_can_be_found_by_its_module(tmp_path: Path) -> None:
    """As pickle, copy and dataclasses do."""
    write(
        tmp_path,
        models__net="from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Config:\n    width: int = 3",
    )
    config = import_from(tmp_path, "models.net").Config()
    assert sys.modules[type(config).__module__].Config is type(config)
    assert config.width == 3
