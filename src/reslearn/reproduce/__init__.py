"""Every table and figure of the papers as an experiment: what is trained or measured, what is claimed, and whether it holds."""
