"""The miniature: a whole small SDXL, its recogniser, its adapters and their judges, trained from nothing on avatars."""
