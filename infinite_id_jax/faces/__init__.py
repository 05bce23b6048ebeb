"""Detection, alignment and recognition behind one small protocol."""
