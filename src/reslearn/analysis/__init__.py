"""Analyses of a trained network: its responses, what its blocks contribute, where its gradient comes from."""
