"""Tests of k25sys.models."""
