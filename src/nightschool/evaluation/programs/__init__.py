"""Programs that a model wrote, run where they can harm nothing, and judged by their tests."""
