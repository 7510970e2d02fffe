"""Helpers that know nothing of Patchscopes: plain values, checked arguments, files."""
