"""Turn the scores of runs into a page, charts, tables and a model card."""
