"""Pure functions from counts to numbers with their intervals."""
