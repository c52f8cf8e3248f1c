"""Image classification: recipes, task and evaluation."""
