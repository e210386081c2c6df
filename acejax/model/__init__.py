"""The networks: pure `init` and `apply` functions over plain trees of arrays."""
