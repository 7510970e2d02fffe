"""NDIF: requests, jobs, how large they are, and the log that makes a run resume."""
