"""Programs compiled for devices that are not here, by their real compilers, and what these make of them."""
