"""The commands; each is a short function that calls the rest."""
