"""The shell: watches in, writes out."""
