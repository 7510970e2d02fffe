"""Jobs on servers: how they are sent, followed and sent again, their size, and the log of a run's jobs."""
