"""The Kimi-K2.5 model: architecture only, plain modules that know no parallelism."""
