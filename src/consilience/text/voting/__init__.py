"""Vote rules: which answer wins."""
