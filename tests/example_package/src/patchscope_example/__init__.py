"""What patchscope_nn finds in this package is named by the entry points of its pyproject.toml."""
