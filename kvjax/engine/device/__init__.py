"""Device side of the engine: the split model, the compiled steps, the runner that owns the arrays, and their sizes."""
