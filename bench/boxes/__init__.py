"""Questions about boxes: what a model answers, and what that is worth."""
