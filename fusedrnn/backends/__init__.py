"""The backends. Each module has ``forward`` and ``backward`` of one layer-direction sequence, same signature."""
