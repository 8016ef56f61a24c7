"""A cost model and a cluster simulator: what a run on a machine that is not here would take."""
