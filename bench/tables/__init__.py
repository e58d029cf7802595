"""Results as tables in Markdown."""
