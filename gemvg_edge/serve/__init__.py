"""`gemvg serve`: one process that speaks HTTP, and workers that hold the model. Needs the extra `serve`."""
