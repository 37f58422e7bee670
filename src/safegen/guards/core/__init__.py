"""The guarded pipeline: settings, hooks, results and the runner."""
