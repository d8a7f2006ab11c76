"""Plan to Outcomes, and back: the tier, the writer, the journal of before-values, and the undo."""
