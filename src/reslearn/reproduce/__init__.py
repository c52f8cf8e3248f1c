"""Every table and figure of the papers as an experiment: what it trains or measures, its claims, and their verdicts."""
