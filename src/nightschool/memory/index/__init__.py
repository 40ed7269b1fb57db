"""Where the entries of a memory are found: addresses by content, in numpy alone. Derived from the store, and rebuildable."""
