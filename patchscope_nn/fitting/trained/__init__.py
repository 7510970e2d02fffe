"""Mappings and prompts that are trained, or differentiated, through a frozen model."""
