"""Fitting mappings and prompts: what is trained or differentiated through a frozen model."""
