"""Names of layers: which model family they belong to, and how different programs spell the same layer."""
