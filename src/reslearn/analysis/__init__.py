"""A trained network taken apart: what its layers put out, what its blocks are worth, where its gradient comes from."""
