"""Night school for language models: they learn while you sleep, and open in the morning with the newest version."""

__version__ = "0.1.0"

__all__ = ["__version__"]
