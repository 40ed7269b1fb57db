"""Architectures and loaders. Nothing here reaches torch; importing peft does, and bitsandbytes where it is installed."""

import logging

# At its import it advises to install kernels that it would fetch and run.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
