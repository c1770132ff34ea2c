"""Health checks of a run between two steps; the run is put back bit for bit."""
