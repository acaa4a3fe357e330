"""One run: examined, prepared, placed, computed, described and published."""
