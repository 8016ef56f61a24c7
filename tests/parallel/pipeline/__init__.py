"""Tests of k25sys.parallel.pipeline."""
