"""Which gangs wait, in which order they are tried, and what is kept for whom."""
