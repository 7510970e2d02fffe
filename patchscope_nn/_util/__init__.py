"""Helpers that know nothing about Patchscopes: plain values, checked arguments, files."""
