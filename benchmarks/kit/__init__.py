"""What the benchmarks share: statistics, tables, pages, results, options, emulated hosts, and steps that are timed."""
