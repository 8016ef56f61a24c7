"""Benchmarks of the Kimi K2.5 report by their scoring rules, on local files; its values are documentation only."""
