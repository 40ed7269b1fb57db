"""Explicit memories over HTTP."""
