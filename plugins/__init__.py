"""One folder per accelerator; each could be lifted out as a package of its own."""
