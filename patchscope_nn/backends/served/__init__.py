"""vLLM engines behind `patchscope serve`: the server, and its client."""
