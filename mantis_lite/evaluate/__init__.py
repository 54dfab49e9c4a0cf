"""Did it get better: benchmarks, rows of one's own, and two models side by side."""
