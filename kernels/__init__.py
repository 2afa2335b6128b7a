"""Generated modules of the built-in specs, one a variant: `dspace generate NAME` writes them again."""
