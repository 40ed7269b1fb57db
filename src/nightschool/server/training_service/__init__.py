"""Fine-tuning and serving over REST for many organisations, as WaveStack's clients call it (rows 001-1 … 001-33)."""
