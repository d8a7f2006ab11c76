"""GPU batch beside GPU services: what is measured on a real card."""
