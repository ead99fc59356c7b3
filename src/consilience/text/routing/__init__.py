"""Rules that draw from several models, or share a budget between the problems of a run."""
