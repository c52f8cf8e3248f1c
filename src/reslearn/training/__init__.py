"""Training: from a request to a run folder, interrupted and resumed bit for bit. It knows no task."""
