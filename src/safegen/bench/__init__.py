"""From a plan of prompts and seeds to pictures, verdicts, scores and a report."""
