"""The version of the package, importable from everywhere without loading the rest."""

__version__ = "0.1.0"
