"""Results of runs as tables and plots for other programs: CSV, JSON, LaTeX, PNG and SVG."""
