"""One file a result that someone wants: overrides of the defaults."""
