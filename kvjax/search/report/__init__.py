"""Reports of search results: figures, tables of the terminal, and the view of a notebook."""
