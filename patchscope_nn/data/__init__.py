"""Data rows: files, data frames, the Hugging Face Hub, and the data that ships. Does not import torch."""
