"""The frozen base: SDXL and its relatives. Nothing here has heard of identities."""
