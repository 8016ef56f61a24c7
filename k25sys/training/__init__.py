"""Where models meet the grid of ranks, and what trains them."""
