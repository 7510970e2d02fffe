"""Mappings fitted in closed form, from the states of two models or two layers at the same places of texts."""
