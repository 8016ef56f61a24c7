"""Tests of k25sys.ops."""
