"""Entropy coding: a module as integers on a fine grid, and as the fewest bytes that these integers need."""
