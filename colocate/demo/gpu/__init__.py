"""The law of the cards, shown on simulated ones."""
