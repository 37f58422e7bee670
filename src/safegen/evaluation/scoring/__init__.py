"""Turn verdicts and features into scores."""
