"""The Monte Carlo parts alone: arrays in, arrays out. Nothing here knows of texts, models or files."""
