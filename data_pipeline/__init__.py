"""Photos in, records out, offline; and the loader that feeds training from them."""
