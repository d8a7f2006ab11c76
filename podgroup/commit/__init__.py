"""How a planned gang is bound: all of it, or it is taken back."""
