"""Parts that benchmarks share: the command line, the record of results, models of random weights, texts."""
