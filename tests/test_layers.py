"""Imports point down only: the contracts in pyproject.toml hold."""

from __future__ import annotations

from importlinter.cli import lint_imports


def test_every_import_contract_holds(capsys):
    assert lint_imports(cache_dir=None) == 0, capsys.readouterr().out
