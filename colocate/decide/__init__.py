"""Forecast to Plan: one law a file, each the owner of its knobs, unaware of the others; `pipeline` joins them."""
