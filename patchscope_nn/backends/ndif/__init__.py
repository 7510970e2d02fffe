"""NDIF: its client, and what may travel to its servers."""
