"""Output of a model that is more than text: calls of tools and what it thought, told apart as it comes."""
