"""The commands that measure: evaluate, score, report, results and verify."""
