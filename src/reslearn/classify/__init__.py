"""Image classification: its recipes, its task, its evaluation."""
