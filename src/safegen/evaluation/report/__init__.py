"""The reports of runs: page, charts, tables and model cards."""
