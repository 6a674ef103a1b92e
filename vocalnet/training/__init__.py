"""Training: one task per stage, one engine for all of them."""
