"""What pictures are worth: metrics with their intervals, and a report that shows them. Knows no model."""
