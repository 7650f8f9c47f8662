"""One page for each method. The file name is the registry: a page put here is a recipe."""
