"""Parts of the HTML page: tables of stacked cells, failures, settings in words, next commands."""
