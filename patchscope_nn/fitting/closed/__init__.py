"""Mappings in closed form, from states that two models or two layers have of the same texts."""
