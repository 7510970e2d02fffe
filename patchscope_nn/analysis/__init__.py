"""Analysis of a run's cells: tables, statistics, comparisons, ensembles and probes."""
