"""Identity-enhanced training: the adapter learns, the base does not (Infinite-ID Sec. 3.2)."""
