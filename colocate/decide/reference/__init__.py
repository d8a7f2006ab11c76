"""Published laws of peers, transcribed as pure functions, to compare with and to run as arms of a benchmark."""
