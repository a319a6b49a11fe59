"""Models: the text encoder, the two towers, the ranker, their losses and tuning."""
