"""What the cells of a run add up to: tables, statistics, comparisons, ensembles and probes."""
