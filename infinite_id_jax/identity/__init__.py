"""The paper: each equation of Infinite-ID as one short function."""
