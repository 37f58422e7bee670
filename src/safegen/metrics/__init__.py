"""Pure functions from counts, verdicts and features to numbers with their n and interval."""
