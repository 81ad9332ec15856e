"""Rows of the perturbation methods."""

from models.methods.row import Method

ROWS: tuple[Method, ...] = ()
