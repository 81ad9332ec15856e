"""The colour tables that maps are drawn with: 256 RGB levels each, lowest value first."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import numpy as np

Colormap = Literal["turbo", "viridis", "inferno", "magma", "jet", "gray", "coolwarm"]

# Each table: differences between consecutive levels (modulo 256), one colour channel after the
# other, deflated and in base 85. Sources: turbo (A. Mikhailov, Google, Apache-2.0), viridis,
# inferno, magma (S. van der Walt, N. Smith, CC0), coolwarm (K. Moreland, "Diverging Color Maps for
# Scientific Visualization", 2009), jet and gray (piecewise linear).
_PACKED: Mapping[Colormap, str] = {
    "turbo": (
        "c-mc(TNcA02t@Ijes?AP@BVjXw88+=3?t_>G4=v}a*850CxSK6LRzee*jiZo7kj@Ye33Fo;n=DiRhFt$dA8r>V-L0o"
        "CpnyiX(5zK(GH#vLN{CDmc<&f#=DrZ=UgIHL<=FD0k<%$5N}*C=SN=+KN-K5;Pj3j=&giMgjeyWd1J#vcHpu>P3;ux"
        "`?^HEU%mD1)>_@hn6xE23yeU4^$vvAn(@#O$MMj%V;}DV(n1?la`8^0)2uV<>Fx4jre6Y5<4`x9zaYQZ=?AISX^{"
    ),
    "viridis": (
        "c-n<hi4lY#3{0@KE8+St<xsL4Sjp&Rzu+jyOg`opECkc)X`Q6qnhK3HNo_OG;RhV>kb4UegZDb1pdhW1hA(9608i7%"
        "o<`5u+O6#W6MI|R-q~_nLKyo3Fq1@l=e3($blyl0DjP1z=#&|HsQxfvb9OjPgHv1mpkyG8q{bp%?-(;)vb7T{kBAB"
    ),
    "inferno": (
        "c-nnYff9uv2!rhX{~u?`HW6PJ%pqLTG0e>d{DJHs!U>Qs;e$R4<q|F;;(*eOB!nkOv@Yrca*^RRewRH^w6*urP6u^g"
        "eWN|pynv!x9d(YM%G6!t7O)v|#%cbNLw)LdoUU&gNobki>0F5>sw(}<pOS}zaOtF1yLP_vOejQK(?U6N(<p5Kb`Gcg"
        "5T42nM;>jU"
    ),
    "magma": (
        "c-nnZ0TRO?2ov1@zwB-SL$G!b1Lv7mfnj3+W>_$1*l-6$vculB^q1sG_f&LnT*IwwB;bXl<Uh79*?xVvf`0)m>K0|9"
        "YP!<*pnj$WHo~<BT6(W=N!o!IuJjWh_vy5m1SCzK_+2Be79*q0Xg#o_&`SykB*7c7NQn@fO{<x$$z{pxF?9O+h+oRd"
        "Ex7"
    ),
    "jet": (
        "c-muNpcP<ZVP<9qVP*^lc2WG&jO4rI_a88XQm9OVnpr3V%v1=;zkmMz0U=Zh8w-yV4zn9rSYeQrg%yoMzLWp|1v(mn"
        "F&WrJ@k#%qSt<npF%q$X"
    ),
    "gray": ("c-muN9NB<j)c+$I004fx0{#"),
    "coolwarm": (
        "c-noD*%8Aa3`D_grG*rozG9F;2a*=XXb+EntY<!To-0ML7wg#g616O`>TrsfRZ8V4@(71m!z3|A#rC4^CGHY3-)k(s"
        "yh+2VhDvxFRM~KR3~DC9_OLvz-x0uKiY*bkc@4KFy8kji<pVC@$ut2&Dbl@|5iL?tq=G9ks_^huhe;7`UjJqfpML-#"
        "{!;D"
    ),
}


def _unpack(packed: str) -> np.ndarray:
    steps = np.frombuffer(zlib.decompress(base64.b85decode(packed)), np.uint8).reshape(3, 256)
    table = np.ascontiguousarray(np.cumsum(steps, axis=1, dtype=np.uint8).T)
    table.setflags(write=False)
    return table


COLORMAPS: Mapping[Colormap, np.ndarray] = MappingProxyType(
    {name: _unpack(packed) for name, packed in _PACKED.items()}
)
"""Colour tables by name, in the order of the wire contract: read-only uint8 (256, 3)."""
